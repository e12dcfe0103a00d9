"""The Hugging Face Hub as SOURCE and as a place to publish; its client is imported when used."""
