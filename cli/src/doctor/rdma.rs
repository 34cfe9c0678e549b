//! What RDMA needs of the host: drivers, a port that is up, an address and an MTU, and libibverbs.
//!
//! On a host without a device none of it is a problem: connections use TCP. What the network does (PFC, ECN) cannot be
//! read here; the checks say where to look.

use super::{Finding, Host, Verdict};

const CLASS: &str = "sys/class/infiniband";
/// The port that Drystone uses.
const PORT: u32 = 1;
/// What RoCE v2 may put around a payload, as the kernel counts it: GRH, UDP, BTH, XRC, atomics and ICRC.
const ROCE_HEADER_BYTES: u32 = 40 + 8 + 12 + 4 + 28 + 4;
/// A packet's payload below which too much of a 4 KiB block's time is headers.
const PAYLOAD_MIN: u32 = 1024;
/// The largest payload of a packet: a block.
const PAYLOAD_MAX: u32 = 4096;
/// A GID that is not set.
const NO_GID: &str = "0000:0000:0000:0000:0000:0000:0000:0000";

/// An address of a RoCE v2 port.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Gid {
    index: u32,
    text: String,
    net: Option<String>,
}

impl Gid {
    fn is_link_local(&self) -> bool {
        self.text.starts_with("fe80:")
    }
}

/// A device, as far as its port is concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Device {
    name: String,
    /// `4: ACTIVE`.
    state: String,
    /// RoCE, not InfiniBand.
    ethernet: bool,
    /// Those of RoCE v2, routable ones first.
    gids: Vec<Gid>,
}

impl Device {
    fn read(host: &Host, name: String) -> Self {
        let port = format!("{CLASS}/{name}/ports/{PORT}");
        let state = host.text(&format!("{port}/state")).unwrap_or_else(|| "no port 1".to_owned());
        let ethernet = host.text(&format!("{port}/link_layer")).as_deref() == Some("Ethernet");
        let indexes = host.names(&format!("{port}/gids"));
        let read = |index: &String| {
            let text = host.text(&format!("{port}/gids/{index}")).filter(|gid| gid != NO_GID)?;
            let kind = host.text(&format!("{port}/gid_attrs/types/{index}"))?;
            let net = host.text(&format!("{port}/gid_attrs/ndevs/{index}"));
            (kind == "RoCE v2").then_some(Gid { index: index.parse().ok()?, text, net })
        };
        let mut gids: Vec<Gid> = indexes.iter().filter_map(read).collect();
        gids.sort_by_key(|gid| (gid.is_link_local(), gid.index));
        Self { name, state, ethernet, gids }
    }

    fn is_active(&self) -> bool {
        self.state.ends_with(": ACTIVE")
    }

    /// The network device beneath.
    fn net(&self) -> Option<&str> {
        self.gids.first()?.net.as_deref()
    }
}

/// The RDMA devices of the host.
pub(super) fn devices(host: &Host) -> Vec<Device> {
    host.names(CLASS).into_iter().map(|name| Device::read(host, name)).collect()
}

/// Everything about RDMA.
pub(super) fn examine(host: &Host, devices: &[Device]) -> Vec<Finding> {
    let mut findings = vec![
        present(host, devices),
        ports(devices),
        modules(host, devices),
        verbs_files(host, devices),
        provider(host),
    ];
    for device in devices.iter().filter(|device| device.is_active() && device.ethernet) {
        findings.push(gid(device));
        findings.extend(device.net().map(|net| mtu(host, device, net)));
        findings.push(congestion(host, device));
    }
    // Where there is nothing to use RDMA with, nothing of it can be missing.
    for finding in findings.iter_mut().filter(|finding| finding.verdict == Verdict::Problem) {
        if devices.is_empty() {
            finding.verdict = Verdict::Note;
        }
    }
    findings
}

fn present(host: &Host, devices: &[Device]) -> Finding {
    const CHECK: &str = "RDMA device";
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    if names.is_empty() {
        return Finding::note(
            CHECK,
            "none",
            "connections use TCP; RDMA would save CPU time and a part of the round trip",
            "with a card that can do it, load its driver (mlx5_ib, irdma, bnxt_re); without one, for trying things \
             out: `rdma link add rxe0 type rxe netdev INTERFACE`",
        );
    }
    if host.rdma_built {
        return Finding::ok(CHECK, names.join(", "));
    }
    Finding::problem(
        CHECK,
        format!("{}, which this program cannot use", names.join(", ")),
        "it was built without RDMA, so connections use TCP",
        "build it with `--features rdma`",
    )
}

fn ports(devices: &[Device]) -> Finding {
    const CHECK: &str = "RDMA port";
    let said: Vec<String> = devices.iter().map(|d| format!("{} is {}", d.name, d.state)).collect();
    let said = said.join(", ");
    const WHY: &str = "only a device whose port 1 is active can be used; connections use TCP otherwise";
    const FIX: &str = "`rdma link` and `ip link` show the port: is the cable in, is the interface up?";
    let active = devices.iter().filter(|device| device.is_active()).count();
    match active {
        0 if devices.is_empty() => Finding::note(CHECK, "none", WHY, "see RDMA device"),
        0 => Finding::problem(CHECK, said, WHY, FIX),
        some if some < devices.len() => Finding::note(CHECK, said, WHY, FIX),
        _ => Finding::ok(CHECK, said),
    }
}

fn modules(host: &Host, devices: &[Device]) -> Finding {
    const CHECK: &str = "RDMA modules";
    let has = |module: &str| host.exists(&format!("sys/module/{module}"));
    // Built into the kernel it may have no directory of its own, but its class is there.
    if !has("ib_uverbs") && !host.exists("sys/class/infiniband_verbs") {
        return Finding::problem(
            CHECK,
            "ib_uverbs is not loaded",
            "programs reach RDMA devices through it",
            "modprobe ib_uverbs, and its name in /etc/modules-load.d/rdma.conf",
        );
    }
    if !devices.is_empty() && !has("rdma_ucm") {
        return Finding::note(
            CHECK,
            "ib_uverbs, without rdma_ucm",
            "Drystone does not need rdma_ucm, but rping and most of perftest with -R, which tell a broken network \
             from a broken node, do",
            "modprobe rdma_ucm",
        );
    }
    Finding::ok(CHECK, if has("rdma_ucm") { "ib_uverbs, rdma_ucm" } else { "ib_uverbs" })
}

fn verbs_files(host: &Host, devices: &[Device]) -> Finding {
    const CHECK: &str = "/dev/infiniband";
    const DIR: &str = "dev/infiniband";
    const WHY: &str = "a node opens the device through its uverbs file, for reading and writing";
    let files: Vec<String> = host.names(DIR).into_iter().filter(|name| name.starts_with("uverbs")).collect();
    if files.is_empty() {
        let fix = "the kernel makes one for each device once ib_uverbs is loaded; in a container, pass the directory in \
                   (`--device /dev/infiniband`)";
        return Finding::problem(CHECK, "no uverbs file", WHY, fix);
    }
    let refused = |name: &&String| !(host.may_use)(&host.path(&format!("{DIR}/{name}")));
    let refused: Vec<&str> = files.iter().filter(refused).map(String::as_str).collect();
    if refused.is_empty() {
        return Finding::ok(CHECK, format!("{} can be used by this user", files.join(", ")));
    }
    let found = format!("this user may not use {}", refused.join(", "));
    let fix = "install rdma-core, whose udev rules open it to all users, or add the node's user to the file's group; \
               ask again as that user";
    // Another user's device may be closed on purpose; one that can be used is enough.
    let all = refused.len() == files.len() && !devices.is_empty();
    if all { Finding::problem(CHECK, found, WHY, fix) } else { Finding::note(CHECK, found, WHY, fix) }
}

fn provider(host: &Host) -> Finding {
    const CHECK: &str = "libibverbs provider";
    let drivers = host.names("etc/libibverbs.d").into_iter().filter(|name| name.ends_with(".driver"));
    let mut found: Vec<String> = drivers.map(|name| name.trim_end_matches(".driver").to_owned()).collect();
    if found.is_empty() {
        let dirs = host.names("usr/lib").into_iter().map(|arch| format!("usr/lib/{arch}/libibverbs"));
        let libraries = dirs.chain(["usr/lib64/libibverbs".to_owned()]).flat_map(|dir| host.names(&dir));
        let providers =
            libraries.filter_map(|name| Some(name.strip_prefix("lib")?.split_once("-rdmav")?.0.to_owned()));
        found = providers.collect();
        found.dedup();
    }
    if !found.is_empty() {
        return Finding::ok(CHECK, found.join(", "));
    }
    Finding::problem(
        CHECK,
        "none",
        "libibverbs finds no device without a provider for its driver",
        "apt-get install ibverbs-providers (or what came with the card's driver)",
    )
}

fn gid(device: &Device) -> Finding {
    const CHECK: &str = "RoCE v2 address";
    let name = &device.name;
    let Some(first) = device.gids.first() else {
        return Finding::problem(
            CHECK,
            format!("{name} has none"),
            "RoCE v1 is not routed, and devices that use RoCE v2 do not understand it",
            "give the interface an IP address; `cma_roce_mode` or the driver's options choose RoCE v2",
        );
    };
    let net = first.net.as_deref().unwrap_or("an unknown interface");
    let found = format!("{name} has {} on {net} at index {}", first.text, first.index);
    if first.is_link_local() {
        return Finding::note(
            CHECK,
            format!("{found}, which is link-local"),
            "a link-local address is not routed: peers in another subnet stay on TCP",
            format!("give {net} the IP address that the node's data is reached at"),
        );
    }
    Finding::ok(CHECK, found)
}

/// The largest payload of a packet that fits an Ethernet device's MTU: a power of two, as the verbs have it.
fn payload(mtu: u32) -> u32 {
    let room = mtu.saturating_sub(ROCE_HEADER_BYTES);
    [PAYLOAD_MAX, 2048, PAYLOAD_MIN, 512, 256].into_iter().find(|bytes| *bytes <= room).unwrap_or(0)
}

fn mtu(host: &Host, device: &Device, net: &str) -> Finding {
    const CHECK: &str = "RDMA MTU";
    let Some(mtu) = host.text(&format!("sys/class/net/{net}/mtu")).and_then(|text| text.parse().ok()) else {
        return Finding::note(
            CHECK,
            format!("{}: the MTU of {net} cannot be read", device.name),
            "it bounds RDMA's packets",
            "look at `ip link`: 1500 gives packets of 1024 bytes, 4200 and more 4096",
        );
    };
    let bytes = payload(mtu);
    let found = format!("{}: {net} has {mtu}, which gives packets of {bytes} bytes", device.name);
    let fix = format!("`ip link set {net} mtu 9000`, on every node and every switch between them");
    if bytes >= PAYLOAD_MAX {
        Finding::ok(CHECK, found)
    } else if bytes >= PAYLOAD_MIN {
        let why = "a block of 4 KiB goes in one packet only with 4096; smaller ones cost the card more work";
        Finding::note(CHECK, found, why, fix)
    } else {
        let why = "with packets this small most of a block's time is headers";
        Finding::problem(CHECK, found, why, fix)
    }
}

/// What can be seen of flow control; the rest is the switches'.
fn congestion(host: &Host, device: &Device) -> Finding {
    const CHECK: &str = "PFC and ECN";
    let net = device.net().unwrap_or("INTERFACE");
    let enabled = |side: &str| {
        let dir = format!("sys/class/net/{net}/ecn/{side}/enable");
        let on = |class: &String| host.text(&format!("{dir}/{class}")).as_deref() == Some("1");
        let classes = host.names(&dir);
        (!classes.is_empty()).then(|| {
            let on: Vec<String> = classes.into_iter().filter(on).collect();
            let on = if on.is_empty() { "none".to_owned() } else { on.join(",") };
            format!("{side} is on for priorities {on}")
        })
    };
    let ecn: Vec<String> = ["roce_np", "roce_rp"].into_iter().filter_map(enabled).collect();
    let ecn = if ecn.is_empty() { "the driver shows nothing of ECN".to_owned() } else { ecn.join(", ") };
    let tcp = host.text("proc/sys/net/ipv4/tcp_ecn").unwrap_or_else(|| "unknown".to_owned());
    Finding::note(
        CHECK,
        format!(
            "{}: {ecn}; whether PFC is on cannot be read here; for TCP, net.ipv4.tcp_ecn is {tcp}",
            device.name
        ),
        "RoCE on a network that drops packets is slower than TCP: switches and cards need ECN, or PFC, for it",
        format!(
            "look with `mlnx_qos -i {net}` (Mellanox), `lldptool -t -i {net} -V PFC` or `dcb pfc show dev {net}`, and \
             at the switches; packets have the device's default traffic class"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::super::tree::Tree;
    use super::*;
    use std::path::Path;

    const PORT_DIR: &str = "sys/class/infiniband/mlx5_0/ports/1";

    /// A host with a RoCE device on which all is well.
    fn roce() -> Tree {
        let tree = Tree::new();
        let put = |path: &str, text: &str| tree.put(&format!("{PORT_DIR}/{path}"), text);
        put("state", "4: ACTIVE\n");
        put("link_layer", "Ethernet\n");
        for (index, gid, kind) in [
            (0, "fe80:0000:0000:0000:0000:0000:0000:0001", "RoCE v2"),
            (1, "0000:0000:0000:0000:0000:ffff:0a00:0001", "IB/RoCE v1"),
            (3, "0000:0000:0000:0000:0000:ffff:0a00:0001", "RoCE v2"),
            (4, NO_GID, "RoCE v2"),
        ] {
            put(&format!("gids/{index}"), gid);
            put(&format!("gid_attrs/types/{index}"), kind);
            put(&format!("gid_attrs/ndevs/{index}"), "eth0");
        }
        tree.put("sys/class/net/eth0/mtu", "9000\n");
        tree.dir("sys/module/ib_uverbs");
        tree.dir("sys/module/rdma_ucm");
        tree.put("dev/infiniband/uverbs0", "");
        tree.put("etc/libibverbs.d/mlx5.driver", "driver mlx5\n");
        tree
    }

    fn verdicts(host: &Host) -> Vec<(&'static str, Verdict)> {
        let findings = examine(host, &devices(host));
        findings.iter().map(|finding| (finding.check, finding.verdict)).collect()
    }

    fn verdict(host: &Host, check: &str) -> Verdict {
        let found = verdicts(host).into_iter().find(|(name, _)| *name == check);
        found.unwrap_or_else(|| panic!("no {check}")).1
    }

    #[test]
    fn a_host_that_is_set_up_has_only_the_note_about_the_network() {
        let tree = roce();
        for (check, verdict) in verdicts(&tree.host()) {
            let expected = if check == "PFC and ECN" { Verdict::Note } else { Verdict::Ok };
            assert_eq!(verdict, expected, "{check}");
        }
        let finding = gid(&devices(&tree.host())[0]);
        assert!(finding.found.ends_with("on eth0 at index 3"), "{finding:?}");
    }

    #[test]
    fn without_a_device_nothing_is_a_problem() {
        let verdicts = verdicts(&Tree::new().host());
        assert_eq!(verdicts.len(), 5);
        assert!(verdicts.iter().all(|(_, verdict)| *verdict == Verdict::Note), "{verdicts:?}");
    }

    #[test]
    fn a_program_without_rdma_cannot_use_the_device() {
        let tree = roce();
        let host = Host { rdma_built: false, ..tree.host() };
        assert_eq!(verdict(&host, "RDMA device"), Verdict::Problem);
    }

    #[test]
    fn one_active_port_is_enough() {
        let tree = roce();
        tree.put("sys/class/infiniband/mlx5_1/ports/1/state", "1: DOWN\n");
        assert_eq!(verdict(&tree.host(), "RDMA port"), Verdict::Note);
        tree.put(&format!("{PORT_DIR}/state"), "1: DOWN\n");
        assert_eq!(verdict(&tree.host(), "RDMA port"), Verdict::Problem);
    }

    #[test]
    fn modules_that_are_not_loaded_are_named() {
        let tree = roce();
        std::fs::remove_dir(tree.host().path("sys/module/rdma_ucm")).unwrap();
        assert_eq!(verdict(&tree.host(), "RDMA modules"), Verdict::Note);
        std::fs::remove_dir(tree.host().path("sys/module/ib_uverbs")).unwrap();
        assert_eq!(verdict(&tree.host(), "RDMA modules"), Verdict::Problem);
        tree.dir("sys/class/infiniband_verbs");
        assert_eq!(verdict(&tree.host(), "RDMA modules"), Verdict::Note);
    }

    #[test]
    fn verbs_files_must_be_there_and_usable() {
        fn nothing(_: &Path) -> bool {
            false
        }
        let tree = roce();
        let host = Host { may_use: nothing, ..tree.host() };
        assert_eq!(verdict(&host, "/dev/infiniband"), Verdict::Problem);
        std::fs::remove_file(host.path("dev/infiniband/uverbs0")).unwrap();
        assert_eq!(verdict(&tree.host(), "/dev/infiniband"), Verdict::Problem);
    }

    #[test]
    fn a_provider_is_found_by_its_file_or_its_library() {
        let tree = roce();
        std::fs::remove_file(tree.host().path("etc/libibverbs.d/mlx5.driver")).unwrap();
        assert_eq!(verdict(&tree.host(), "libibverbs provider"), Verdict::Problem);
        tree.put("usr/lib/x86_64-linux-gnu/libibverbs/libmlx5-rdmav34.so", "");
        let finding = provider(&tree.host());
        assert_eq!((finding.verdict, finding.found.as_str()), (Verdict::Ok, "mlx5"));
    }

    #[test]
    fn a_port_needs_a_routable_roce_v2_address() {
        let tree = roce();
        tree.put(&format!("{PORT_DIR}/gid_attrs/types/3"), "IB/RoCE v1");
        assert_eq!(verdict(&tree.host(), "RoCE v2 address"), Verdict::Note);
        tree.put(&format!("{PORT_DIR}/gid_attrs/types/0"), "IB/RoCE v1");
        assert_eq!(verdict(&tree.host(), "RoCE v2 address"), Verdict::Problem);
    }

    #[test]
    fn packets_are_as_large_as_the_interface_allows() {
        // As the kernel computes it: 1500 gives 1024, 4200 gives 4096.
        assert_eq!([1500, 4200, 4191, 9000, 576, 100].map(payload), [1024, 4096, 2048, 4096, 256, 0]);
        let tree = roce();
        for (mtu, expected) in [("1500", Verdict::Note), ("1000", Verdict::Problem), ("x", Verdict::Note)] {
            tree.put("sys/class/net/eth0/mtu", mtu);
            assert_eq!(verdict(&tree.host(), "RDMA MTU"), expected, "{mtu}");
        }
    }

    #[test]
    fn what_the_driver_shows_of_ecn_is_told_and_nothing_claimed() {
        let tree = roce();
        let found = |tree: &Tree| congestion(&tree.host(), &devices(&tree.host())[0]).found;
        assert!(found(&tree).contains("shows nothing of ECN"), "{}", found(&tree));
        tree.put("sys/class/net/eth0/ecn/roce_np/enable/3", "1\n");
        tree.put("sys/class/net/eth0/ecn/roce_np/enable/4", "0\n");
        tree.put("proc/sys/net/ipv4/tcp_ecn", "2\n");
        assert!(found(&tree).contains("roce_np is on for priorities 3;"), "{}", found(&tree));
        assert!(found(&tree).contains("tcp_ecn is 2"), "{}", found(&tree));
    }

    #[test]
    fn infiniband_needs_no_roce_address() {
        let tree = roce();
        tree.put(&format!("{PORT_DIR}/link_layer"), "InfiniBand\n");
        assert!(verdicts(&tree.host()).iter().all(|(_, verdict)| *verdict == Verdict::Ok));
    }
}
