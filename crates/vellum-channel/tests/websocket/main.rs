//! WebSocket channels: against raw bytes, good and hostile, and against other implementations.

mod closing;
mod frames;
mod handshake;
mod hostile;
mod peers;
mod support;
mod tasks;
mod transfer;
