//! What a request must look like before anybody acts on it.

use crate::bounds::{
    ADDRESS_BYTES_MAX, KEY_BYTES_MAX, TXN_BYTES_MAX, TXN_OPS_MAX, VALUE_BYTES_MAX, VOTERS_MAX,
};
use serde::de::IgnoredAny;
use wire::control::{Compare, MetaRequest, Write};

fn is_key(key: &str) -> bool {
    !key.is_empty() && key.len() <= KEY_BYTES_MAX
}

/// Whether a request is well formed: bounds hold and values are JSON.
pub fn is_valid(request: &MetaRequest) -> bool {
    match request {
        MetaRequest::Voters | MetaRequest::CancelVoters => true,
        MetaRequest::ChangeVoters { add, remove } => {
            let is_address = |address: &str| {
                !address.is_empty()
                    && address.len() <= ADDRESS_BYTES_MAX
                    && !address.chars().any(char::is_control)
            };
            add.len() <= VOTERS_MAX
                && remove.len() <= VOTERS_MAX
                && add.iter().all(|new| new.node.0 != 0 && is_address(&new.address))
        }
        MetaRequest::Range { prefix, .. } => prefix.len() <= KEY_BYTES_MAX,
        MetaRequest::LeaseKeep { lease, .. } | MetaRequest::LeaseRevoke { lease } => *lease != 0,
        MetaRequest::Txn { compares, writes } => {
            let mut bytes = 0usize;
            let compares_ok = compares.len() <= TXN_OPS_MAX
                && compares.iter().all(|compare| match compare {
                    Compare::ModRevision { key, .. } | Compare::Exists { key } => is_key(key),
                    Compare::Bound { key, lease } => is_key(key) && *lease != 0,
                });
            let writes_ok = writes.len() <= TXN_OPS_MAX
                && writes.iter().all(|write| match write {
                    Write::Put { key, value, lease } => {
                        bytes = bytes.saturating_add(key.len() + value.len());
                        is_key(key)
                            && value.len() <= VALUE_BYTES_MAX
                            && *lease != Some(0)
                            && serde_json::from_str::<IgnoredAny>(value).is_ok()
                    }
                    Write::Delete { key } => {
                        bytes = bytes.saturating_add(key.len());
                        is_key(key)
                    }
                    Write::DeletePrefix { prefix } => {
                        bytes = bytes.saturating_add(prefix.len());
                        is_key(prefix)
                    }
                });
            compares_ok && writes_ok && bytes <= TXN_BYTES_MAX
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str) -> MetaRequest {
        let write = Write::Put { key: key.into(), value: value.into(), lease: None };
        MetaRequest::Txn { compares: vec![], writes: vec![write] }
    }

    #[test]
    fn bounds_and_json_are_enforced() {
        assert!(is_valid(&put("/a", "{\"x\":[1,2]}")));
        for bad in ["", "{", "nul", "1 2", &"[".repeat(10_000)] {
            assert!(!is_valid(&put("/a", bad)), "{bad:.20}");
        }
        assert!(!is_valid(&put("", "1")));
        assert!(!is_valid(&put(&"k".repeat(KEY_BYTES_MAX + 1), "1")));
        assert!(!is_valid(&put("/a", &format!("\"{}\"", "v".repeat(VALUE_BYTES_MAX)))));
        assert!(!is_valid(&MetaRequest::LeaseRevoke { lease: 0 }));
    }
}
