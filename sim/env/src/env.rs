//! The environment's traits over the universe: what a service holds while it runs.

use crate::clock::US;
use crate::disk::Submitter;
use crate::universe::{Action, CoreIdx, Universe};
use reactor::{
    Arena, Buffers, Clock, ConnId, Disk, DiskIndex, DiskInfo, DiskOp, Frame, Framing, Full, IoBuf, Mesh,
    MeshMsg, Mono, Net, NetError, Rng, Timers, Token, WallMs,
};
use std::net::SocketAddr;
use wire::CoreId;

/// One core's view of the universe, for the length of a call.
pub struct SimEnv<'a> {
    pub(crate) universe: &'a mut Universe,
    pub(crate) core: CoreIdx,
}

impl SimEnv<'_> {
    fn this(&self) -> &crate::universe::Core {
        // The scheduler makes an environment only for a core that it has just looked up.
        &self.universe.cores[self.core]
    }

    fn clock(&self) -> crate::clock::NodeClock {
        self.universe.hosts.get(self.this().host).map(|host| host.clock).unwrap_or_default()
    }
}

impl Clock for SimEnv<'_> {
    fn now(&self) -> Mono {
        self.clock().local(self.universe.now)
    }
    fn wall(&self) -> WallMs {
        WallMs(self.clock().wall_ms(self.universe.now))
    }
}

impl Rng for SimEnv<'_> {
    fn random(&mut self) -> u64 {
        self.universe.cores.get_mut(self.core).map_or(0, |core| core.rng.bits())
    }
}

impl Timers for SimEnv<'_> {
    fn set_timer(&mut self, at: Mono, token: Token) {
        let late = self.universe.disk_rng.below(20 * US);
        let due = self.clock().global(at).max(self.this().depart) + late;
        self.universe.set_timer(self.core, at, due, token);
    }
}

impl Disk for SimEnv<'_> {
    fn disk_info(&self, disk: DiskIndex) -> Option<DiskInfo> {
        let id = *self.this().disks.get(usize::from(disk.0))?;
        self.universe.disks.get(id).map(|disk| disk.info())
    }

    fn submit(&mut self, disk: DiskIndex, op: DiskOp, token: Token) -> Result<(), (Full, DiskOp)> {
        let id = self.this().disks.get(usize::from(disk.0)).copied().unwrap_or(usize::MAX);
        let depart = self.this().depart;
        let from = Submitter { core: self.core, index: disk, token };
        let Some(target) = self.universe.disks.get_mut(id) else { return Err((Full, op)) };
        match target.submit(from, op, depart) {
            Ok((number, took)) => {
                self.universe.at(depart + took, Action::Disk(id, number));
                Ok(())
            }
            Err(op) => Err((Full, op)),
        }
    }
}

impl Net for SimEnv<'_> {
    fn listen(&mut self, at: SocketAddr, framing: Framing, token: Token) -> Result<SocketAddr, NetError> {
        self.universe.net_listen(self.core, at, framing, token)
    }
    fn connect(&mut self, to: SocketAddr, framing: Framing) -> ConnId {
        self.universe.net_connect(self.core, to, framing)
    }
    fn send(&mut self, conn: ConnId, frame: Frame) -> Result<(), Full> {
        self.universe.net_send(conn, frame)
    }
    fn send_bytes(&mut self, conn: ConnId, bytes: IoBuf) -> Result<(), Full> {
        self.universe.net_send_bytes(conn, bytes)
    }
    fn close(&mut self, conn: ConnId, after_flush: bool) {
        self.universe.net_close(conn, after_flush);
    }
    fn expect(&mut self, conn: ConnId, request: u64, into: IoBuf) {
        self.universe.net_expect(conn, request, into);
    }
}

impl Mesh for SimEnv<'_> {
    fn core(&self) -> CoreId {
        self.this().id
    }
    fn post(&mut self, to: CoreId, msg: MeshMsg) -> Result<(), (Full, MeshMsg)> {
        self.universe.post(self.core, to, msg).map_err(|msg| (Full, msg))
    }
}

impl Buffers for SimEnv<'_> {
    fn arena(&self) -> &Arena {
        &self.this().arena
    }
}
