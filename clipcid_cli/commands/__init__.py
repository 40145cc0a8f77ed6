"""Floor 4: one thin file per subcommand; click and rich live only here."""
