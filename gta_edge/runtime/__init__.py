"""Bundle to session, session to tokens."""
