//! What every node needs of the kernel: its version, io_uring, locked memory, and CPUs that do not doze.

use super::{Finding, Host};
use crate::node::locked_besides_buffers;
use crate::units::ByteSize;

/// The oldest kernel whose io_uring has what the loop uses.
const KERNEL_MIN: (u32, u32) = (6, 1);

/// Whether the kernel is new enough.
pub(super) fn version(host: &Host) -> Finding {
    const CHECK: &str = "kernel version";
    let text = host.text("proc/sys/kernel/osrelease").unwrap_or_default();
    match parse(&text) {
        Some(version) if version >= KERNEL_MIN => Finding::ok(CHECK, text),
        Some(_) => Finding::problem(
            CHECK,
            text,
            "the loop of each core needs an io_uring that came with 6.1; a node does not start",
            "install a newer kernel (Debian 12 has 6.1)",
        ),
        None => Finding::note(
            CHECK,
            format!("'{text}' cannot be understood"),
            "a node needs 6.1 or later",
            "look at `uname -r`",
        ),
    }
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether processes may use io_uring.
pub(super) fn io_uring(host: &Host) -> Finding {
    const CHECK: &str = "io_uring";
    const WHY: &str = "a node does all its I/O with io_uring and does not start without it";
    const FIX: &str =
        "sysctl -w kernel.io_uring_disabled=0, and the same in /etc/sysctl.d/ for the next boot";
    match host.text("proc/sys/kernel/io_uring_disabled").as_deref() {
        Some("0") => Finding::ok(CHECK, "allowed (a container's seccomp profile may still forbid it)"),
        Some("1") => {
            let group = host.text("proc/sys/kernel/io_uring_group").unwrap_or_else(|| "-1".to_owned());
            let found = format!("allowed to group {group} only (kernel.io_uring_disabled is 1)");
            Finding::problem(CHECK, found, WHY, format!("{FIX}; or put the node's user in that group"))
        }
        Some(other) => {
            Finding::problem(CHECK, format!("disabled: kernel.io_uring_disabled is {other}"), WHY, FIX)
        }
        // Before 6.6 there is no such switch.
        None => Finding::ok(CHECK, "this kernel has no switch to forbid it"),
    }
}

/// Whether a node may lock as much memory as it registers.
pub(super) fn memlock(host: &Host, rdma: bool, polls: bool) -> Finding {
    const CHECK: &str = "locked memory";
    let rings = if polls { 2 } else { 1 };
    // The kernel counts buffers for each ring, and for the RDMA device once more.
    let times = rings + u64::from(rdma);
    let buffers = u64::from(host.cores).saturating_mul(host.buffer_bytes).saturating_mul(times);
    let wanted = ByteSize(buffers.saturating_add(locked_besides_buffers(host.cores, rings)));
    let cores = host.cores;
    let Some(limit) = host.memlock.map(ByteSize) else {
        return Finding::ok(CHECK, format!("unlimited; {cores} core(s) want {wanted}"));
    };
    let found = format!("the limit here is {limit}; {cores} core(s) want {wanted}");
    let fix = "LimitMEMLOCK=infinity in the node's unit (the unit in deploy/ has it), or `ulimit -l unlimited` in \
               the shell that starts it; this is the limit of the shell that asked";
    match (limit >= wanted, rdma) {
        (true, _) => Finding::ok(CHECK, found),
        (false, true) => Finding::problem(
            CHECK,
            found,
            "buffers that cannot be registered with the RDMA device leave their core on TCP",
            fix,
        ),
        (false, false) => Finding::note(
            CHECK,
            found,
            "buffers that are not registered work, a little slower: the kernel pins them for each operation",
            fix,
        ),
    }
}

/// Whether CPUs run at their full frequency.
pub(super) fn governor(host: &Host) -> Finding {
    const CHECK: &str = "CPU governor";
    const CPUS: &str = "sys/devices/system/cpu";
    let is_cpu = |name: &String| name.strip_prefix("cpu").is_some_and(|rest| rest.parse::<u32>().is_ok());
    let governors: Vec<String> = host
        .names(CPUS)
        .iter()
        .filter(|name| is_cpu(name))
        .filter_map(|cpu| host.text(&format!("{CPUS}/{cpu}/cpufreq/scaling_governor")))
        .collect();
    let slow: Vec<&String> = governors.iter().filter(|name| *name != "performance").collect();
    match slow.first() {
        None if governors.is_empty() => Finding::ok(CHECK, "the kernel does not scale frequencies here"),
        None => Finding::ok(CHECK, format!("performance on all {} CPUs", governors.len())),
        Some(first) => Finding::note(
            CHECK,
            format!("{first} on {} of {} CPUs", slow.len(), governors.len()),
            "a core that sleeps between operations is given a low frequency, and each operation takes longer",
            "cpupower frequency-set -g performance",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::super::tree::Tree;
    use super::*;

    #[test]
    fn kernels_before_6_1_are_too_old() {
        let verdict = |release: &str| {
            let tree = Tree::with(&[("proc/sys/kernel/osrelease", release)]);
            version(&tree.host()).verdict
        };
        assert_eq!(verdict("6.1.0-13-amd64\n"), Verdict::Ok);
        assert_eq!(verdict("6.12"), Verdict::Ok);
        assert_eq!(verdict("7.0-rc1"), Verdict::Ok);
        assert_eq!(verdict("5.15.0-100-generic"), Verdict::Problem);
        assert_eq!(verdict("6.0.19"), Verdict::Problem);
        assert_eq!(verdict("hurd"), Verdict::Note);
    }

    #[test]
    fn io_uring_must_not_be_disabled() {
        let verdict = |value: &str| {
            let tree = Tree::with(&[("proc/sys/kernel/io_uring_disabled", value)]);
            io_uring(&tree.host()).verdict
        };
        assert_eq!(verdict("0\n"), Verdict::Ok);
        assert_eq!(verdict("1\n"), Verdict::Problem);
        assert_eq!(verdict("2\n"), Verdict::Problem);
        assert_eq!(io_uring(&Tree::new().host()).verdict, Verdict::Ok);
    }

    #[test]
    fn a_low_memlock_limit_is_a_problem_only_for_rdma() {
        let tree = Tree::new();
        let host = |memlock| Host { memlock, ..tree.host() };
        assert_eq!(memlock(&host(None), true, true).verdict, Verdict::Ok);
        assert_eq!(memlock(&host(Some(8 << 20)), false, false).verdict, Verdict::Note);
        assert_eq!(memlock(&host(Some(8 << 20)), true, false).verdict, Verdict::Problem);
        // Four cores of 64 MiB: once for the ring, a second time for the device, and a little more.
        assert_eq!(memlock(&host(Some(300 << 20)), false, false).verdict, Verdict::Ok);
        assert_eq!(memlock(&host(Some(300 << 20)), true, false).verdict, Verdict::Problem);
        assert_eq!(memlock(&host(Some(600 << 20)), true, false).verdict, Verdict::Ok);
        assert_eq!(memlock(&host(Some(600 << 20)), true, true).verdict, Verdict::Problem);
    }

    #[test]
    fn every_cpu_should_run_at_full_speed() {
        let tree = Tree::with(&[
            ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n"),
            ("sys/devices/system/cpu/cpufreq/boost", "1\n"),
        ]);
        assert_eq!(governor(&tree.host()).verdict, Verdict::Ok);
        tree.put("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave\n");
        let finding = governor(&tree.host());
        assert_eq!((finding.verdict, finding.found.as_str()), (Verdict::Note, "powersave on 1 of 2 CPUs"));
        assert_eq!(governor(&Tree::new().host()).verdict, Verdict::Ok);
    }
}
