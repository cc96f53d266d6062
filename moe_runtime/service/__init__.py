"""The router service: batches tokens, runs the engine, reports; knows neither Ray nor gRPC nor ZeroMQ."""
