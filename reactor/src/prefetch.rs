//! Telling the processor what will be read soon.

/// Bytes that come together.
const LINE_BYTES: usize = 64;

/// The same as `prefetch` for every cache line of a value.
#[inline(always)]
pub fn prefetch_all<T>(at: &T) {
    // SAFETY: the bytes of a value that is borrowed; they are not read.
    let bytes = unsafe {
        std::slice::from_raw_parts(std::ptr::from_ref(at).cast::<std::mem::MaybeUninit<u8>>(), size_of::<T>())
    };
    bytes.iter().step_by(LINE_BYTES).for_each(prefetch);
}

/// Begins to bring `at` into the processor's caches and does not wait for it. Only its first cache line: large values
/// are worth one call per line that will be read.
#[inline(always)]
pub fn prefetch<T>(at: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint without effects on memory or registers, and every x86-64 processor has it.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(at).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
