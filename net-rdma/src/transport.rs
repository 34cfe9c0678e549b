//! The `Transport` of an RDMA device: everything that needs a connection is refused.

use crate::{Device, DeviceOptions, RdmaError};
use reactor::backend::{Transport, TransportIo};
use reactor::{CloseReason, ConnId, Event, Frame, Framing, Full, IoBuf, Mono, NetError, Token};
use std::net::SocketAddr;

/// RDMA for one core. See the crate's page for what it does not do yet.
pub struct RdmaTransport {
    device: Device,
    attempts: u64,
}

impl RdmaTransport {
    /// Opens the device.
    pub fn open(options: &DeviceOptions) -> Result<Self, RdmaError> {
        Ok(Self { device: Device::open(options)?, attempts: 0 })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Transport for RdmaTransport {
    fn listen(
        &mut self,
        _: &mut TransportIo<'_>,
        _: SocketAddr,
        _: Framing,
        _: Token,
    ) -> Result<SocketAddr, NetError> {
        Err(NetError::Os(EOPNOTSUPP))
    }

    fn connect(&mut self, io: &mut TransportIo<'_>, _: SocketAddr, _: Framing) -> ConnId {
        self.attempts += 1;
        let conn = ConnId(self.attempts);
        io.events.push_back(Event::Closed { conn, reason: CloseReason::Broken(EOPNOTSUPP) });
        conn
    }

    fn send(&mut self, _: &mut TransportIo<'_>, _: ConnId, _: Frame) -> Result<(), Full> {
        Ok(())
    }

    fn send_bytes(&mut self, _: &mut TransportIo<'_>, _: ConnId, _: IoBuf) -> Result<(), Full> {
        Ok(())
    }

    fn close(&mut self, _: &mut TransportIo<'_>, _: ConnId, _: bool) {}

    fn expect(&mut self, _: ConnId, _: u64, _: IoBuf) {}

    fn completed(&mut self, _: &mut TransportIo<'_>, _: u64, _: i32, _: u32) {}

    fn prepare(&mut self, _: &mut TransportIo<'_>) {}

    fn deadline(&self) -> Option<Mono> {
        None
    }
}

/// "Operation not supported", as Linux numbers it.
const EOPNOTSUPP: i32 = 95;
