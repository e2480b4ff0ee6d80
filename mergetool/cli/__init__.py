"""The command line: one file a command. Commands parse, call the library, and print; nothing is computed here."""
