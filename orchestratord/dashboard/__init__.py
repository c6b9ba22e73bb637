"""The dashboard's files: HTML, scripts and a style sheet. No Python lives here."""
