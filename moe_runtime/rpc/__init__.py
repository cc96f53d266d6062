"""The gRPC edge: the server in front of a router service, and the clients; the only layer that imports grpc."""
