"""What every floor of the package stands on: text for people, JSON files that are not trusted."""
