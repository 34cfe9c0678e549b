//! Mutual exclusion: two clients never hold one lock at the same time.

use super::history::Hold;
use std::collections::BTreeMap;

/// What was found.
#[derive(Default, Debug)]
pub struct Judged {
    /// Holds looked at.
    pub holds: usize,
    /// What was wrong.
    pub violations: Vec<String>,
}

/// Judges all holds. Their ends are times at which the holder was still sure.
pub fn judge(holds: &[Hold]) -> Judged {
    let mut judged = Judged { holds: holds.len(), violations: Vec::new() };
    let mut by_key: BTreeMap<&str, Vec<&Hold>> = BTreeMap::new();
    for hold in holds {
        by_key.entry(&hold.key).or_default().push(hold);
    }
    for (key, mut list) in by_key {
        list.sort_by_key(|hold| (hold.from, hold.lease));
        let mut latest: Option<&Hold> = None;
        for hold in list {
            if let Some(before) = latest.filter(|before| before.until > hold.from) {
                judged.violations.push(format!(
                    "lock {key} was taken by client {} at {} while client {} held it until {}",
                    hold.client,
                    simenv::trace::stamp(hold.from),
                    before.client,
                    simenv::trace::stamp(before.until),
                ));
            }
            if latest.is_none_or(|before| before.until < hold.until) {
                latest = Some(hold);
            }
        }
    }
    judged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_holders_at_a_time_are_noticed() {
        let hold = |client, from, until| Hold { key: "/l".into(), client, lease: client as u64, from, until };
        assert!(judge(&[hold(1, 0, 10), hold(2, 10, 20)]).violations.is_empty());
        assert_eq!(judge(&[hold(1, 0, 10), hold(2, 9, 20)]).violations.len(), 1);
        assert_eq!(judge(&[hold(1, 0, 50), hold(2, 60, 61), hold(3, 40, 41)]).violations.len(), 1);
    }
}
