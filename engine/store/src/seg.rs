//! A growable array in chunks: growing copies nothing and wastes at most one chunk.

/// Elements in a chunk: 128 KiB of 32-byte elements, small against any slice's memory.
const CHUNK: usize = 4096;

/// The array. Indices are `u32`-sized by convention of its users.
pub(crate) struct Seg<T> {
    chunks: Vec<Box<[T]>>,
    len: usize,
}

impl<T: Copy + Default> Seg<T> {
    pub(crate) fn new() -> Self {
        Self { chunks: Vec::new(), len: 0 }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn get(&self, at: usize) -> Option<&T> {
        if at >= self.len {
            return None;
        }
        self.chunks.get(at / CHUNK)?.get(at % CHUNK)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        if at >= self.len {
            return None;
        }
        self.chunks.get_mut(at / CHUNK)?.get_mut(at % CHUNK)
    }

    /// `len` elements from `at` on; empty when they do not lie in one chunk, or not all exist.
    #[inline]
    pub(crate) fn run(&self, at: usize, len: usize) -> &[T] {
        if at.saturating_add(len) > self.len {
            return &[];
        }
        let chunk = self.chunks.get(at / CHUNK);
        chunk.and_then(|chunk| chunk.get(at % CHUNK..at % CHUNK + len)).unwrap_or(&[])
    }

    /// As `run`, to be changed.
    #[inline]
    pub(crate) fn run_mut(&mut self, at: usize, len: usize) -> &mut [T] {
        if at.saturating_add(len) > self.len {
            return &mut [];
        }
        let chunk = self.chunks.get_mut(at / CHUNK);
        chunk.and_then(|chunk| chunk.get_mut(at % CHUNK..at % CHUNK + len)).unwrap_or(&mut [])
    }

    /// Appends; allocates one chunk at most.
    #[inline]
    pub(crate) fn push(&mut self, value: T) -> usize {
        let at = self.len;
        if at / CHUNK >= self.chunks.len() {
            self.chunks.push(vec![T::default(); CHUNK].into_boxed_slice());
        }
        self.len += 1;
        if let Some(to) = self.get_mut(at) {
            *to = value;
        }
        at
    }

    /// Grows to at least `len` elements, new ones default.
    pub(crate) fn grow(&mut self, len: usize) {
        while self.len < len {
            self.push(T::default());
        }
    }

    /// Forgets the elements, keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        self.chunks.len() * CHUNK * size_of::<T>() + self.chunks.capacity() * size_of::<Box<[T]>>()
    }
}
