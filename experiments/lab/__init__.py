"""What every program shares: flags, sessions, records, tables, pictures."""
