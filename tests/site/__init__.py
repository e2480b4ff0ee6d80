"""The docs as a site: built strictly, found in few clicks, searched and read without a network."""
