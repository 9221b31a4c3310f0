"""How other libraries' models come to use the generic operators, one file per library."""
