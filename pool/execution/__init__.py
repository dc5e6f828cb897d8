"""An operation under way: its placed model, its requests and answers, and what follows."""
