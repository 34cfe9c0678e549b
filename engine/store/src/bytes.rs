//! Little-endian fields at fixed offsets. Reading outside a slice gives zero, writing outside does
//! nothing: callers check lengths first, and damaged bytes can never make these panic.

macro_rules! field {
    ($get:ident, $put:ident, $type:ty) => {
        #[inline]
        pub(crate) fn $get(bytes: &[u8], at: usize) -> $type {
            const N: usize = size_of::<$type>();
            match bytes.get(at..at.saturating_add(N)).and_then(|b| b.first_chunk::<N>()) {
                Some(chunk) => <$type>::from_le_bytes(*chunk),
                None => 0,
            }
        }

        #[inline]
        pub(crate) fn $put(bytes: &mut [u8], at: usize, value: $type) {
            const N: usize = size_of::<$type>();
            if let Some(to) = bytes.get_mut(at..at.saturating_add(N)) {
                to.copy_from_slice(&value.to_le_bytes());
            }
        }
    };
}

field!(get_u16, put_u16, u16);
field!(get_u32, put_u32, u32);
field!(get_u64, put_u64, u64);
field!(get_u128, put_u128, u128);

#[inline]
pub(crate) fn get_u8(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

#[inline]
pub(crate) fn put_u8(bytes: &mut [u8], at: usize, value: u8) {
    if let Some(to) = bytes.get_mut(at) {
        *to = value;
    }
}

/// A block address: 40 bits.
#[inline]
pub(crate) fn get_addr(bytes: &[u8], at: usize) -> u64 {
    match bytes.get(at..at.saturating_add(5)) {
        Some(&[a, b, c, d, e]) => u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]),
        _ => 0,
    }
}

#[inline]
pub(crate) fn put_addr(bytes: &mut [u8], at: usize, value: u64) {
    if let (Some(to), Some(from)) =
        (bytes.get_mut(at..at.saturating_add(5)), value.to_le_bytes().first_chunk::<5>())
    {
        to.copy_from_slice(from);
    }
}

/// `bytes[at..at + len]`, empty when outside.
#[inline]
pub(crate) fn part(bytes: &[u8], at: usize, len: usize) -> &[u8] {
    bytes.get(at..at.saturating_add(len)).unwrap_or(&[])
}
