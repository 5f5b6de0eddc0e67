"""What the worker and the trainer must agree on: event and score schemas, targets, features, network, artifact, registry."""
