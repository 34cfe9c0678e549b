//! Sizes as people write and read them: `10G`, `2GiB`, `512k`, `1048576`.
//!
//! All suffixes are binary (1G = 1GiB = 2^30): that is what disks of virtual machines are sized in.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// A number of bytes given by or shown to a person.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct ByteSize(pub u64);

/// Why a text is not a size.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum SizeError {
    /// No number in front.
    #[error("'{0}' is not a size: write a number and an optional unit, like 10G, 512MiB or 1048576")]
    NotANumber(String),
    /// A unit that is not known.
    #[error("unknown unit '{0}': use K, M, G, T or P (binary, 1K = 1024), with or without iB")]
    Unit(String),
    /// More than 64 bits.
    #[error("'{0}' does not fit 64 bits")]
    TooLarge(String),
}

const UNITS: [(&str, u32); 6] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let shift = match unit.trim().to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            "p" => 50,
            _ => return Err(SizeError::Unit(unit.trim().to_string())),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let not_a_number = || SizeError::NotANumber(text.to_string());
        let too_large = || SizeError::TooLarge(text.to_string());
        if whole.is_empty() || (number.contains('.') && fraction.is_empty()) || fraction.contains('.') {
            return Err(not_a_number());
        }
        let whole: u64 = whole.parse().map_err(|_| too_large())?;
        let mut bytes = whole.checked_mul(1u64 << shift).ok_or_else(too_large)?;
        if !fraction.is_empty() {
            // At most 9 digits keep the product below 2^50 * 10^9 < 2^80; more say nothing in bytes.
            let digits = fraction.get(..fraction.len().min(9)).unwrap_or("");
            let value: u64 = digits.parse().map_err(|_| not_a_number())?;
            let part = (u128::from(value) << shift) / 10u128.pow(digits.len() as u32);
            bytes = bytes.checked_add(part as u64).ok_or_else(too_large)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) = UNITS.iter().find(|(_, shift)| self.0 >> shift > 0).copied().unwrap_or(("B", 0));
        let whole = self.0 >> shift;
        // Two digits behind the point, rounded down, so that nothing is shown larger than it is.
        let rest = self.0 - (whole << shift);
        let hundredths = ((u128::from(rest) * 100) >> shift) as u64;
        match hundredths {
            0 => write!(f, "{whole}{unit}"),
            h if h % 10 == 0 => write!(f, "{whole}.{}{unit}", h / 10),
            h => write!(f, "{whole}.{h:02}{unit}"),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size in bytes, as a number or as text like \"64MiB\"")
            }
            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(value))
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<ByteSize, E> {
                u64::try_from(value).map(ByteSize).map_err(|_| E::custom("a size cannot be negative"))
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<ByteSize, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_people_write_is_understood() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("4KiB", 4096),
            ("10G", 10 << 30),
            ("2GiB", 2 << 30),
            ("2 gib", 2 << 30),
            ("1.5T", 3 << 39),
            ("100MB", 100 << 20),
            ("16TiB", 16 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1", "1.2.3G", "1.", ".5G", "ten"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert_eq!("5X".parse::<ByteSize>(), Err(SizeError::Unit("X".into())));
        assert_eq!("99999P".parse::<ByteSize>(), Err(SizeError::TooLarge("99999P".into())));
        assert!("99999999999999999999".parse::<ByteSize>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_shown_is_never_more_and_hardly_less(bytes in 0u64..1 << 60) {
            let shown: ByteSize = ByteSize(bytes).to_string().parse().unwrap();
            prop_assert!(shown.0 <= bytes);
            prop_assert!(bytes - shown.0 <= bytes / 100 + 1);
        }
    }
}
