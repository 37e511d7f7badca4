"""Makes the demo models: their corpus, tokenizer, training and export. Not part of the wheel."""
