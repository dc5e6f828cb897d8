"""What does things: browser sessions, their pages, and the Ray actors that own them."""
