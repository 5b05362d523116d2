"""One small GPT-2 trained with CAME and with AdamW, from text to a summary: ``make quickstart``."""
