//! Where pages are (the page table, always in memory, 12 bytes per page of 12 objects) and the pages that
//! are in memory (the cache, bounded, second-chance eviction, and 4 bytes per page to find them).

use reactor::IoBuf;
use wire::BLOCK_BYTES;

use crate::page::{BlockRef, NODE_ENTRIES, tree_shape};
use crate::seg::Seg;

/// Fewest pages in the cache: a checkpoint holds one batch, readers need some beside it.
pub(crate) const CACHE_PAGES_MIN: usize = 128;

#[derive(Clone, Copy, Default)]
struct Packed([u32; 3]);

impl Packed {
    fn get(self) -> BlockRef {
        let [low, high, crc] = self.0;
        BlockRef { addr: u64::from(low) | u64::from(high) << 32, crc }
    }
    fn of(r: BlockRef) -> Self {
        Self([r.addr as u32, (r.addr >> 32) as u32, r.crc])
    }
}

/// The page map, in memory.
pub(crate) struct PageTable {
    pages: Seg<Packed>,
    /// Level 0 and level 1 nodes.
    pub(crate) maps: Vec<BlockRef>,
    pub(crate) tops: Vec<BlockRef>,
    pub(crate) root: BlockRef,
}

impl PageTable {
    pub(crate) fn new() -> Self {
        Self { pages: Seg::new(), maps: Vec::new(), tops: Vec::new(), root: BlockRef::default() }
    }

    pub(crate) fn len(&self) -> u32 {
        self.pages.len() as u32
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pages.bytes() + (self.maps.capacity() + self.tops.capacity()) * size_of::<BlockRef>()
    }

    /// Makes room for `pages` pages and the nodes above them.
    pub(crate) fn grow(&mut self, pages: u32) {
        if pages <= self.len() {
            return;
        }
        self.pages.grow(pages as usize);
        let (maps, tops) = tree_shape(self.len());
        if self.maps.len() < maps {
            self.maps.resize(maps, BlockRef::default());
        }
        if self.tops.len() < tops {
            self.tops.resize(tops, BlockRef::default());
        }
    }

    #[inline]
    pub(crate) fn get(&self, page: u32) -> BlockRef {
        self.pages.get(page as usize).map_or(BlockRef::default(), |p| p.get())
    }

    pub(crate) fn set(&mut self, page: u32, to: BlockRef) {
        if let Some(p) = self.pages.get_mut(page as usize) {
            *p = Packed::of(to);
        }
    }

    /// What entry `entry` of node `number` of `level` must say.
    pub(crate) fn child(&self, level: u8, number: usize, entry: usize) -> BlockRef {
        let at = number * NODE_ENTRIES + entry;
        match level {
            0 => self.get(at as u32),
            1 => self.maps.get(at).copied().unwrap_or_default(),
            _ => self.tops.get(at).copied().unwrap_or_default(),
        }
    }

    /// Where a node is.
    pub(crate) fn node_mut(&mut self, level: u8, number: usize) -> Option<&mut BlockRef> {
        match level {
            0 => self.maps.get_mut(number),
            1 => self.tops.get_mut(number),
            _ => Some(&mut self.root),
        }
    }
}

/// What a frame is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FrameState {
    Empty,
    Loading,
    Ready,
}

struct Frame {
    page: u32,
    state: FrameState,
    pins: u16,
    referenced: bool,
    buf: Option<IoBuf>,
}

/// What a request for a page came to.
pub(crate) enum Lookup {
    /// It is in this frame.
    Ready(u32),
    /// It is being read; ask again when a page has arrived.
    Loading,
    /// It must be read, into this buffer; tell `loaded`.
    Load(u32, IoBuf),
    /// Every frame is in use; ask again when a page has arrived.
    Full,
}

pub(crate) struct Cache {
    frames: Vec<Frame>,
    /// Per page its frame plus one; 0 = none. Four bytes per twelve objects, for one look-up less in every
    /// read.
    of_page: Seg<u32>,
    hand: usize,
    capacity: usize,
    pub(crate) hits: u64,
    pub(crate) misses: u64,
}

impl Cache {
    pub(crate) fn new(bytes: usize) -> Self {
        Self {
            frames: Vec::new(),
            of_page: Seg::new(),
            hand: 0,
            capacity: (bytes / BLOCK_BYTES).max(CACHE_PAGES_MIN),
            hits: 0,
            misses: 0,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.frames.len() * (BLOCK_BYTES + size_of::<Frame>()) + self.of_page.bytes()
    }

    #[inline]
    fn find(&self, page: u32) -> Option<u32> {
        self.of_page.get(page as usize)?.checked_sub(1)
    }

    fn set_frame_of(&mut self, page: u32, frame: Option<u32>) {
        self.of_page.grow(page as usize + 1);
        if let Some(to) = self.of_page.get_mut(page as usize) {
            *to = frame.map_or(0, |frame| frame + 1);
        }
    }

    /// The page's bytes when they are in memory. Does not count and does not load.
    #[inline]
    pub(crate) fn peek(&self, page: u32) -> Option<&[u8]> {
        let frame = self.frames.get(self.find(page)? as usize)?;
        if frame.state == FrameState::Ready { frame.buf.as_ref().map(IoBuf::as_slice) } else { None }
    }

    /// The bytes of a frame that `lookup` said is ready.
    #[inline]
    pub(crate) fn frame(&self, at: u32) -> Option<&[u8]> {
        self.frames.get(at as usize)?.buf.as_ref().map(IoBuf::as_slice)
    }

    /// Asks for a page.
    pub(crate) fn lookup(&mut self, page: u32) -> Lookup {
        if let Some(at) = self.find(page)
            && let Some(frame) = self.frames.get_mut(at as usize)
        {
            frame.referenced = true;
            if frame.state == FrameState::Ready {
                self.hits += 1;
                return Lookup::Ready(at);
            }
            return Lookup::Loading;
        }
        let Some((at, buf)) = self.claim(page, FrameState::Loading) else { return Lookup::Full };
        self.misses += 1;
        Lookup::Load(at, buf)
    }

    /// A frame of zeroes for a page that is nowhere yet. `None` when every frame is in use.
    pub(crate) fn create(&mut self, page: u32) -> Option<u32> {
        let (at, mut buf) = self.claim(page, FrameState::Ready)?;
        buf.as_mut_slice()?.fill(0);
        self.frames.get_mut(at as usize)?.buf = Some(buf);
        Some(at)
    }

    fn claim(&mut self, page: u32, state: FrameState) -> Option<(u32, IoBuf)> {
        let at = self.victim()?;
        let frame = self.frames.get_mut(at as usize)?;
        if frame.state != FrameState::Empty {
            let old = frame.page;
            self.set_frame_of(old, None);
        }
        let frame = self.frames.get_mut(at as usize)?;
        // A buffer still on its way to the device (a page evicted right after its write was submitted
        // cannot happen: it is pinned) or never allocated is replaced.
        let buf = match frame.buf.take() {
            Some(buf) if buf.is_unique() => buf,
            _ => IoBuf::heap(BLOCK_BYTES).ok()?,
        };
        frame.page = page;
        frame.state = state;
        frame.referenced = true;
        self.set_frame_of(page, Some(at));
        Some((at, buf))
    }

    fn victim(&mut self) -> Option<u32> {
        if self.frames.len() < self.capacity {
            self.frames.push(Frame {
                page: u32::MAX,
                state: FrameState::Empty,
                pins: 0,
                referenced: false,
                buf: None,
            });
            return Some(self.frames.len() as u32 - 1);
        }
        // Two rounds: the first takes away second chances.
        for _ in 0..2 * self.frames.len() {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.frames.len();
            let frame = self.frames.get_mut(at)?;
            if frame.state == FrameState::Loading || frame.pins > 0 {
                continue;
            }
            if frame.referenced {
                frame.referenced = false;
                continue;
            }
            return Some(at as u32);
        }
        None
    }

    /// A page read has ended; `ok` says whether the bytes are good.
    pub(crate) fn loaded(&mut self, at: u32, buf: Option<IoBuf>, ok: bool) {
        let Some(frame) = self.frames.get_mut(at as usize) else { return };
        frame.buf = buf;
        if ok {
            frame.state = FrameState::Ready;
            return;
        }
        let page = frame.page;
        frame.state = FrameState::Empty;
        frame.page = u32::MAX;
        self.set_frame_of(page, None);
    }

    /// Which page a frame is for.
    pub(crate) fn page_of(&self, at: u32) -> u32 {
        self.frames.get(at as usize).map_or(u32::MAX, |f| f.page)
    }

    /// Keeps a frame from being evicted.
    pub(crate) fn pin(&mut self, at: u32) {
        if let Some(frame) = self.frames.get_mut(at as usize) {
            frame.pins += 1;
        }
    }

    pub(crate) fn unpin(&mut self, at: u32) {
        if let Some(frame) = self.frames.get_mut(at as usize) {
            frame.pins = frame.pins.saturating_sub(1);
        }
    }

    /// The frame's bytes for changing; `None` when a handle to them is still out.
    pub(crate) fn bytes_mut(&mut self, at: u32) -> Option<&mut [u8]> {
        self.frames.get_mut(at as usize)?.buf.as_mut()?.as_mut_slice()
    }

    /// A handle to the frame's bytes, for writing them out.
    pub(crate) fn handle(&self, at: u32) -> Option<IoBuf> {
        self.frames.get(at as usize)?.buf.clone()
    }
}
