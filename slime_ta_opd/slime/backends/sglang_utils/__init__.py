"""SGLang servers as services: start and stop, a client, start-up checks, weight updates. Imports no sglang."""
