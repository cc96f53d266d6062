"""How rows travel between routers and expert hosts: ZeroMQ sockets, or queues within one process."""
