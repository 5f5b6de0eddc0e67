"""The worker: poll -> decode -> load states -> step -> publish -> persist, exactly once."""
