//! Whether NVMe drives can be polled.

use super::{Finding, Host};

const CHECK: &str = "NVMe poll queues";
/// A drive that is polled saves each operation its interrupt.
const WHY: &str = "each completion costs an interrupt; a drive with poll queues is polled instead";

/// The NVMe drives, and whether each can be polled.
fn drives(host: &Host) -> Vec<(String, bool)> {
    let polls = |drive: &str| host.text(&format!("sys/block/{drive}/queue/io_poll")).as_deref() == Some("1");
    let names = host.names("sys/block").into_iter().filter(|name| is_namespace(name));
    names.map(|name| (name.clone(), polls(&name))).collect()
}

/// `nvme0n1`, and not `nvme0c0n1`: that is a hidden path to one.
fn is_namespace(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = name.strip_prefix("nvme").and_then(|rest| rest.split_once('n'));
    numbers.is_some_and(|(controller, namespace)| number(controller) && number(namespace))
}

/// Whether any drive is polled: then cores have two rings.
pub(super) fn any_polls(host: &Host) -> bool {
    drives(host).iter().any(|(_, polls)| *polls)
}

/// Whether all are.
pub(super) fn poll_queues(host: &Host) -> Finding {
    let all = drives(host);
    let without: Vec<&str> = all.iter().filter(|(_, polls)| !polls).map(|(name, _)| name.as_str()).collect();
    if all.is_empty() {
        return Finding::ok(CHECK, "no NVMe drives here");
    }
    if without.is_empty() {
        return Finding::ok(CHECK, format!("on all {} drive(s)", all.len()));
    }
    let parameter = host.text("sys/module/nvme/parameters/poll_queues");
    let found = match parameter.as_deref() {
        Some(number) => format!("none on {} (the driver's poll_queues is {number})", without.join(", ")),
        None => format!("none on {}", without.join(", ")),
    };
    let fix = format!(
        "`options nvme poll_queues={}` in /etc/modprobe.d/nvme.conf, update-initramfs -u, and a reboot; one for each \
         data core. It is a trade: a core that polls keeps its CPU busy",
        host.cores
    );
    Finding::note(CHECK, found, WHY, fix)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tree::Tree;
    use super::*;

    #[test]
    fn drives_without_poll_queues_are_named() {
        let tree = Tree::with(&[
            ("sys/block/nvme0n1/queue/io_poll", "1\n"),
            ("sys/block/nvme0c0n1/queue/io_poll", "0\n"),
            ("sys/block/sda/queue/io_poll", "0\n"),
        ]);
        assert_eq!(poll_queues(&tree.host()).verdict, Verdict::Ok);
        assert!(any_polls(&tree.host()));
        tree.put("sys/block/nvme1n1/queue/io_poll", "0\n");
        tree.put("sys/module/nvme/parameters/poll_queues", "2\n");
        let finding = poll_queues(&tree.host());
        assert_eq!(finding.verdict, Verdict::Note);
        assert_eq!(finding.found, "none on nvme1n1 (the driver's poll_queues is 2)");
        assert!(finding.fix.unwrap().contains("options nvme poll_queues=4"));
    }

    #[test]
    fn a_host_without_nvme_is_well() {
        let tree = Tree::with(&[("sys/block/sda/queue/io_poll", "0\n")]);
        assert_eq!(poll_queues(&tree.host()).verdict, Verdict::Ok);
        assert!(!any_polls(&tree.host()));
        assert!(!is_namespace("nvme0n1p1") && !is_namespace("nvme") && is_namespace("nvme10n12"));
    }
}
