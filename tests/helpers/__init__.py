"""What tests share: tiny models, runs and processes, pages, plans, texts."""
