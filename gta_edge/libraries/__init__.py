"""Optional libraries: which of them are installed, whether they can be used, and the line that installs them."""
