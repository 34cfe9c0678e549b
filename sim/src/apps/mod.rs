//! The second workload: what file systems and databases do to a disk.
//!
//! The first one (`workload`) draws every operation by itself, and its checker works on the whole history when
//! a run is over. This one was written apart from it, so that a blind spot of one is not one of the other: it
//! has contents of its own (`page`), expectations of its own that are kept while it runs (`ledger`), and
//! programs whose operations belong together (`program`). An image is cut into *regions*; a region has a kind,
//! and one client at a time that owns it and hands it over to another when it has finished something.
//!
//! Start reading at `client`.

pub mod client;
pub mod ledger;
pub mod page;
pub mod program;

use simenv::rng::Stream;

/// What happens in a region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A log: records behind each other, a barrier, then the head that says how many there are.
    Log,
    /// Pages that are read, changed and written back, in batches.
    Pages,
    /// Long operations over several objects, at any block.
    Long,
    /// Writes, discards, write-zeroes and reads of the same blocks in a row.
    Holes,
    /// Bursts on a few blocks that nearly everybody wants.
    Hot,
}

/// What a seed decides about this workload: each has its own mix.
#[derive(Clone, Debug)]
pub struct Mix {
    /// The kinds of the regions, in order; their owners at first are the clients in turn.
    pub regions: Vec<Kind>,
    /// Blocks of a region.
    pub region_blocks: u64,
    /// Blocks of a page.
    pub page_blocks: u64,
    /// Most operations of one program.
    pub batch: u64,
    /// A region changes its owner after a program, parts per million.
    pub hand_over_ppm: u32,
    /// Operations under way in a region, at most.
    pub depth: usize,
    /// The images begin with so many of their regions and grow while the work goes on.
    pub first_regions: usize,
}

impl Mix {
    /// What a seed decides.
    pub fn draw(seed: u64, images: usize) -> Self {
        let mut rng = Stream::new(seed, "apps");
        let count = images as u64 * rng.between(2, 5);
        // Each seed leaves some kinds out.
        let kinds: Vec<Kind> = [Kind::Log, Kind::Pages, Kind::Long, Kind::Holes, Kind::Hot]
            .into_iter()
            .filter(|_| rng.chance(650_000))
            .collect();
        let regions: Vec<Kind> =
            (0..count).map(|_| rng.pick(&kinds).copied().unwrap_or(Kind::Pages)).collect();
        let per_image = regions.len() / images;
        Self {
            region_blocks: rng.weighted((2, 64), &[(1, 48), (2, 130), (1, 250)]),
            page_blocks: rng.weighted((2, 1), &[(2, 2), (2, 4)]),
            batch: rng.weighted((2, 8), &[(1, 2), (1, 20)]),
            hand_over_ppm: rng.weighted((1, 0), &[(2, 100_000), (1, 500_000)]),
            depth: rng.weighted((2, 4), &[(1, 1), (1, 16)]),
            first_regions: if rng.coin() { per_image } else { 1 + per_image / 2 },
            regions,
        }
    }

    /// Regions of each image; image `i` has those whose number modulo the images is `i`.
    pub fn per_image(&self, images: usize) -> u64 {
        (self.regions.len() / images) as u64
    }
}
