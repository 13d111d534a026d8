"""The HTTP server: batched generation, and OpenAI's API."""
