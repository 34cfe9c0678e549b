//! What two sides tell each other over TCP before they use RDMA: the payload of `Link` and `LinkReply`.
//!
//! 32 bytes, little-endian: version 1, MTU 1 (as verbs number it), reads 1, zero 1, receives 2, zero 2, queue pair
//! number 4, first packet sequence number 4, GID 16.

use crate::Gid;
use thiserror::Error;
use wire::{BlockCrcs, block_crc};

/// Bytes of an offer.
pub const OFFER_BYTES: usize = 32;
const VERSION: u8 = 1;
/// Verbs number MTUs from 256 bytes (1) to 4096 (5).
const MTUS: std::ops::RangeInclusive<u8> = 1..=5;
/// Fewer receives than this cannot keep a connection going: one is kept for what frees something.
const RECEIVES_MIN: u16 = 4;
/// Queue pair numbers and packet sequence numbers have 24 bits.
const BITS_24: u32 = (1 << 24) - 1;

/// One side's queue pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Largest packet's payload, as verbs number it.
    pub mtu: u8,
    /// RDMA READs that it answers at once.
    pub reads: u8,
    /// Messages that it has receives for.
    pub receives: u16,
    /// Its number.
    pub qpn: u32,
    /// Number of the first packet that it sends.
    pub psn: u32,
    /// Where it is.
    pub gid: Gid,
}

/// Why an offer is declined.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum OfferError {
    /// Another length, or damaged.
    #[error("not an offer")]
    Malformed,
    /// Another version of it.
    #[error("version {0} of the offer, this side speaks {VERSION}")]
    Version(u8),
    /// A number out of its range.
    #[error("{what} {value} is out of range")]
    Range {
        /// Which.
        what: &'static str,
        /// As received.
        value: u32,
    },
    /// The all-zero GID.
    #[error("no GID")]
    NoGid,
}

impl Offer {
    /// Its bytes.
    pub fn encode(&self) -> [u8; OFFER_BYTES] {
        let mut bytes = [0; OFFER_BYTES];
        bytes[0] = VERSION;
        bytes[1] = self.mtu;
        bytes[2] = self.reads;
        bytes[4..6].copy_from_slice(&self.receives.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.qpn.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.psn.to_le_bytes());
        bytes[16..].copy_from_slice(&self.gid.0);
        bytes
    }

    /// Checks and reads what a peer sent.
    pub fn decode(payload: &[u8], crcs: &BlockCrcs) -> Result<Self, OfferError> {
        let bytes: &[u8; OFFER_BYTES] = payload.try_into().map_err(|_| OfferError::Malformed)?;
        if crcs.as_slice() != [block_crc(payload)] {
            return Err(OfferError::Malformed);
        }
        let [version, mtu, reads, _, r0, r1, _, _, q0, q1, q2, q3, p0, p1, p2, p3, ..] = *bytes;
        let gid = bytes.last_chunk::<16>().copied().unwrap_or_default();
        let offer = Self {
            mtu,
            reads,
            receives: u16::from_le_bytes([r0, r1]),
            qpn: u32::from_le_bytes([q0, q1, q2, q3]),
            psn: u32::from_le_bytes([p0, p1, p2, p3]),
            gid: Gid(gid),
        };
        let range = |what, value: u32, ok| if ok { Ok(()) } else { Err(OfferError::Range { what, value }) };
        if version != VERSION {
            return Err(OfferError::Version(version));
        }
        range("MTU", mtu.into(), MTUS.contains(&mtu))?;
        range("count of reads", reads.into(), reads > 0)?;
        let receives = offer.receives;
        range(
            "count of receives",
            receives.into(),
            (RECEIVES_MIN..=crate::link::CREDITS_MAX).contains(&receives),
        )?;
        range("queue pair number", offer.qpn, (1..=BITS_24).contains(&offer.qpn))?;
        range("packet sequence number", offer.psn, offer.psn <= BITS_24)?;
        if gid == [0; 16] { Err(OfferError::NoGid) } else { Ok(offer) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn crcs(payload: &[u8]) -> BlockCrcs {
        let mut crcs = BlockCrcs::default();
        crcs.push(block_crc(payload));
        crcs
    }

    fn offer() -> Offer {
        Offer { mtu: 3, reads: 16, receives: 64, qpn: 17, psn: 0x0012_3456, gid: Gid([7; 16]) }
    }

    #[test]
    fn an_offer_comes_back() {
        let bytes = offer().encode();
        assert_eq!(Offer::decode(&bytes, &crcs(&bytes)), Ok(offer()));
    }

    #[test]
    fn offers_that_cannot_be_meant_are_refused() {
        type Change = fn(&mut Offer);
        let changes: [Change; 8] = [
            |o| o.mtu = 0,
            |o| o.mtu = 6,
            |o| o.reads = 0,
            |o| o.receives = 3,
            |o| o.receives = 5000,
            |o| o.qpn = 1 << 24,
            |o| o.psn = 1 << 24,
            |o| o.gid = Gid([0; 16]),
        ];
        for change in changes {
            let mut bad = offer();
            change(&mut bad);
            let bytes = bad.encode();
            assert!(Offer::decode(&bytes, &crcs(&bytes)).is_err(), "{bad:?}");
        }
        let bytes = offer().encode();
        assert_eq!(Offer::decode(&bytes, &crcs(&[1])), Err(OfferError::Malformed));
        assert_eq!(Offer::decode(&bytes[1..], &crcs(&bytes[1..])), Err(OfferError::Malformed));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Offer::decode(&bytes, &crcs(&bytes));
        }
    }
}
