"""Files and folders: whole or absent, hashed, locked, and listed. Knows no engine and no store."""
