"""An OpenAI-compatible service over one session: schema, scheduler, app, page, and the server that runs them."""
