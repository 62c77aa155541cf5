"""Does attraction to the first token predict attention sinks? A study on trained models, with controls."""
