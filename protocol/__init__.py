"""What client and daemon agree on: errors, messages and the rules of a save. No I/O, no torch, no zmq, no asyncio."""
