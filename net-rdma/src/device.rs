//! A device, its protection domain, and registered memory.

use crate::{Gid, RdmaError};
use rdma_sys as sys;
use reactor::Arena;
use std::ffi::CStr;
use std::io;
use std::net::IpAddr;
use std::ptr::NonNull;
use std::rc::Rc;

/// Which device and which of its addresses.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The device's name, such as `mlx5_0`; the first one when not given.
    pub name: Option<String>,
    /// The port, from 1.
    pub port: u8,
    /// The index in the port's GID table; chosen by `Gid::preference` when not given.
    pub gid_index: Option<u32>,
    /// Prefer the GID of this address, and the device that has it when none is named.
    pub address: Option<IpAddr>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { name: None, port: 1, gid_index: None, address: None }
    }
}

/// An open device with a protection domain.
#[derive(Debug)]
pub struct Device {
    name: String,
    port: u8,
    gid_index: u32,
    gid: Gid,
    limits: Limits,
    context: NonNull<sys::ibv_context>,
    domain: NonNull<sys::ibv_pd>,
}

/// What a device and its port can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Largest packet's payload, as the verbs number it: 1 is 256 bytes, 5 is 4096.
    pub mtu: u8,
    /// Entries of a completion queue.
    pub completions: u32,
    /// RDMA READs that one connection may have outstanding, in either direction.
    pub reads: u8,
}

/// The list of devices, freed when dropped.
struct List {
    first: NonNull<*mut sys::ibv_device>,
    len: usize,
}

impl List {
    fn get() -> Result<Self, RdmaError> {
        let mut len = 0;
        // SAFETY: `len` is valid to write to. Without a device or driver the list is null or empty.
        let first = unsafe { sys::ibv_get_device_list(&raw mut len) };
        let first = NonNull::new(first).ok_or(RdmaError::NoDevice)?;
        let list = Self { first, len: usize::try_from(len).unwrap_or(0) };
        if list.len == 0 { Err(RdmaError::NoDevice) } else { Ok(list) }
    }

    fn devices(&self) -> impl Iterator<Item = (String, NonNull<sys::ibv_device>)> + '_ {
        // SAFETY: the library promises `len` pointers, which live until the list is freed.
        let all = unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) };
        all.iter().filter_map(|device| NonNull::new(*device)).map(|device| {
            // SAFETY: a listed device has a name, a string that lives as long as the list.
            let name = unsafe { CStr::from_ptr(sys::ibv_get_device_name(device.as_ptr())) };
            (name.to_string_lossy().into_owned(), device)
        })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: came from `ibv_get_device_list` and is freed once. Opened devices outlive it.
        unsafe { sys::ibv_free_device_list(self.first.as_ptr()) }
    }
}

/// Closes the context when opening fails half-way.
struct Context(Option<NonNull<sys::ibv_context>>);

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(context) = self.0 {
            // SAFETY: an open context of ours, on which nothing was made yet.
            unsafe { sys::ibv_close_device(context.as_ptr()) };
        }
    }
}

impl Device {
    /// Opens a device, checks its port, chooses its GID and makes a protection domain. Of several devices the first
    /// that has the wanted address, or else the first that works.
    pub fn open(options: &DeviceOptions) -> Result<Self, RdmaError> {
        let list = List::get()?;
        let wanted = |name: &str| options.name.as_deref().is_none_or(|wanted| wanted == name);
        let (mut first, mut failed) = (None, None);
        for (name, device) in list.devices().filter(|(name, _)| wanted(name)) {
            match Self::open_one(name, device, options) {
                Ok(opened) if options.address.is_none_or(|address| opened.gid.ip() == address) => {
                    return Ok(opened.announced());
                }
                Ok(opened) => first = first.or(Some(opened)),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        let none = || failed.unwrap_or(RdmaError::NoSuchDevice(options.name.clone().unwrap_or_default()));
        first.map(Self::announced).ok_or_else(none)
    }

    fn announced(self) -> Self {
        let Self { name, port, gid_index, gid, limits, .. } = &self;
        tracing::info!(device = %name, port, gid_index, %gid, ?limits, "RDMA device opened");
        self
    }

    fn open_one(
        name: String,
        device: NonNull<sys::ibv_device>,
        options: &DeviceOptions,
    ) -> Result<Self, RdmaError> {
        // SAFETY: a listed device.
        let context = NonNull::new(unsafe { sys::ibv_open_device(device.as_ptr()) })
            .ok_or_else(|| RdmaError::Open { device: name.clone(), error: io::Error::last_os_error() })?;
        let mut guard = Context(Some(context));
        let port = port_attr(context, &name, options.port)?;
        let entries = u32::try_from(port.gid_tbl_len).unwrap_or(0);
        let limits = limits(context, &name, &port)?;
        let no_gid = || RdmaError::NoGid { device: name.clone(), port: options.port };
        let (gid_index, gid) = match options.gid_index {
            Some(index) => (index, read_gid(context, options.port, index).ok_or_else(no_gid)?),
            None => choose(context, &name, options, entries).ok_or_else(no_gid)?,
        };
        // SAFETY: an open context.
        let domain = NonNull::new(unsafe { sys::ibv_alloc_pd(context.as_ptr()) })
            .ok_or_else(|| RdmaError::ProtectionDomain(io::Error::last_os_error()))?;
        guard.0 = None;
        let device = Self { name, port: options.port, gid_index, gid, limits, context, domain };
        crate::events::unblock(&device)?;
        Ok(device)
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The port in use, from 1.
    pub fn port(&self) -> u8 {
        self.port
    }

    /// The address in use and its index in the port's table.
    pub fn gid(&self) -> (u32, Gid) {
        (self.gid_index, self.gid)
    }

    /// What it can do.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub(crate) fn context(&self) -> NonNull<sys::ibv_context> {
        self.context
    }

    pub(crate) fn domain(&self) -> NonNull<sys::ibv_pd> {
        self.domain
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: both are ours, and whatever was made of them holds the device, so none of it is left.
        unsafe {
            sys::ibv_dealloc_pd(self.domain.as_ptr());
            sys::ibv_close_device(self.context.as_ptr());
        }
    }
}

/// Registered memory: the arena of a core. The peer can reach it only through windows (see `QueuePair`).
pub struct Region {
    region: NonNull<sys::ibv_mr>,
    _arena: Arena,
    _device: Rc<Device>,
}

impl Region {
    /// Registers all of `arena`, for the device to read from and write to.
    pub fn of(device: &Rc<Device>, arena: &Arena) -> Result<Self, RdmaError> {
        let (base, bytes) = arena.region();
        let flags =
            [sys::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE, sys::ibv_access_flags::IBV_ACCESS_MW_BIND];
        let access = flags.iter().fold(0, |all, flag| all | flag.0 as i32);
        // SAFETY: the region belongs to the arena, a handle to which the `Region` keeps.
        let region = unsafe { sys::ibv_reg_mr(device.domain.as_ptr(), base.cast(), bytes, access) };
        match NonNull::new(region) {
            Some(region) => Ok(Self { region, _arena: arena.clone(), _device: device.clone() }),
            None => Err(RdmaError::Register { bytes, error: io::Error::last_os_error() }),
        }
    }

    pub(crate) fn as_ptr(&self) -> *mut sys::ibv_mr {
        self.region.as_ptr()
    }

    /// The key that work requests carry for memory of this region.
    pub fn local_key(&self) -> u32 {
        // SAFETY: a registered region, which lives as long as this.
        unsafe { self.region.as_ref().lkey }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: ours, and released once; the arena is still alive.
        unsafe { sys::ibv_dereg_mr(self.region.as_ptr()) };
    }
}

/// An active port's attributes.
fn port_attr(
    context: NonNull<sys::ibv_context>,
    name: &str,
    port: u8,
) -> Result<sys::ibv_port_attr, RdmaError> {
    // SAFETY: the structure is plain data, for which zero bytes are a valid value.
    let mut attr: sys::ibv_port_attr = unsafe { std::mem::zeroed() };
    // SAFETY: an open context; the library fills the older, shorter form of the structure here.
    let failed = unsafe { sys::ibv_query_port(context.as_ptr(), port, (&raw mut attr).cast()) } != 0;
    if failed || attr.state != sys::ibv_port_state::IBV_PORT_ACTIVE {
        return Err(RdmaError::PortDown { device: name.to_owned(), port });
    }
    Ok(attr)
}

/// Reads a peer may have outstanding: more than a connection fetches at once gains nothing.
const READS_MAX: i32 = 16;

/// What the device can do; an error when it lacks what the safety of the peers' memory rests on.
fn limits(
    context: NonNull<sys::ibv_context>,
    name: &str,
    port: &sys::ibv_port_attr,
) -> Result<Limits, RdmaError> {
    // SAFETY: the structure is plain data, for which zero bytes are a valid value.
    let mut attr: sys::ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: an open context and a structure to write to.
    if unsafe { sys::ibv_query_device(context.as_ptr(), &raw mut attr) } != 0 {
        return Err(RdmaError::Open { device: name.to_owned(), error: io::Error::last_os_error() });
    }
    let windows = sys::ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW_TYPE_2A.0
        | sys::ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW_TYPE_2B.0;
    if attr.device_cap_flags & windows == 0 {
        return Err(RdmaError::NoWindows(name.to_owned()));
    }
    let reads = attr.max_qp_rd_atom.min(attr.max_qp_init_rd_atom).clamp(1, READS_MAX);
    Ok(Limits {
        mtu: u8::try_from(port.active_mtu).unwrap_or(1),
        completions: u32::try_from(attr.max_cqe).unwrap_or(0),
        reads: reads as u8,
    })
}

fn read_gid(context: NonNull<sys::ibv_context>, port: u8, index: u32) -> Option<Gid> {
    // SAFETY: the union is plain data, for which zero bytes are a valid value.
    let mut gid: sys::ibv_gid = unsafe { std::mem::zeroed() };
    // SAFETY: an open context and a union to write to; a wrong index is reported.
    let read = unsafe { sys::ibv_query_gid(context.as_ptr(), port, index as i32, &raw mut gid) };
    // SAFETY: every bit pattern is valid for the union's bytes.
    let gid = Gid(unsafe { gid.raw });
    (read == 0 && gid.0 != [0; 16]).then_some(gid)
}

/// The best entry of the GID table; when one of them is the wanted address, that one.
fn choose(
    context: NonNull<sys::ibv_context>,
    name: &str,
    options: &DeviceOptions,
    entries: u32,
) -> Option<(u32, Gid)> {
    let port = options.port;
    let rated = (0..entries).filter_map(|index| {
        let gid = read_gid(context, port, index)?;
        let path = format!("/sys/class/infiniband/{name}/ports/{port}/gid_attrs/types/{index}");
        let v2 = std::fs::read_to_string(path).is_ok_and(|kind| kind.trim() == "RoCE v2");
        let wanted = v2 && options.address == Some(gid.ip());
        Some(((wanted, gid.preference(v2)?), index, gid))
    });
    // The lowest index among the best.
    rated
        .max_by_key(|(rank, index, _)| (*rank, std::cmp::Reverse(*index)))
        .map(|(_, index, gid)| (index, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_the_device_says_so() {
        let options = DeviceOptions { name: Some("no-such-device".to_owned()), ..Default::default() };
        let error = Device::open(&options).unwrap_err();
        assert!(matches!(error, RdmaError::NoDevice | RdmaError::NoSuchDevice(_)), "{error}");
    }
}
