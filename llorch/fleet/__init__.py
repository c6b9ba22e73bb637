"""Pool machines over ssh: their registry, commands on many at once, bootstrap, model copies, doctor."""
