"""This machine and the devices that can be planned for."""
