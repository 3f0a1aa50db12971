"""Train mixture-of-experts language models with any router under any parallel layout."""
