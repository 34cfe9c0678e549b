//! Bulk movement of image data: from a file or pipe into an image, out of an image into a file or pipe,
//! and wiping. Many requests are kept under way; zeroes are neither sent nor written.

use crate::cluster::{Cluster, OpenImage};
use crate::deadline::Deadline;
use crate::error::CliError;
use crate::stop::Stop;
use client::{IoDone, Op, OpenMode, SubmitError};
use indicatif::ProgressBar;
use reactor::IoBuf;
use rustix::io::Errno;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::time::Duration;
use wire::{BLOCK_BYTES, OBJECT_BYTES};

/// Bytes moved by one request: eight objects, enough for streaming and little enough for a progress bar.
pub const CHUNK_BYTES: u64 = 8 * OBJECT_BYTES as u64;
/// How long a failed transfer waits for what it has under way.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// Objects removed by one request: as many as the client takes at once.
const DELETE_OBJECTS: u64 = client::MAX_IO_BYTES / OBJECT_BYTES as u64;

/// Requests under way, and the buffers that wait for the next ones.
struct Pipeline<'a> {
    cluster: &'a mut Cluster,
    image: OpenImage,
    depth: usize,
    in_flight: usize,
    spare: Vec<IoBuf>,
    what: &'static str,
    stop: &'a Stop,
}

impl<'a> Pipeline<'a> {
    fn new(
        cluster: &'a mut Cluster,
        image: OpenImage,
        depth: usize,
        what: &'static str,
        stop: &'a Stop,
    ) -> Self {
        Self { cluster, image, depth: depth.max(1), in_flight: 0, spare: Vec::new(), what, stop }
    }

    fn buffer(&mut self) -> Result<IoBuf, CliError> {
        match self.spare.pop() {
            Some(buf) => Ok(buf),
            None => IoBuf::heap(CHUNK_BYTES as usize).map_err(|error| self.failed(0, &error.to_string())),
        }
    }

    fn failed(&self, offset: u64, why: &str) -> CliError {
        CliError::ImageIo { what: self.what, offset, why: why.to_string() }
    }

    /// Submits, waiting for a completion when there is no room. `offset` comes back with the completion.
    fn submit(
        &mut self,
        mut op: Op,
        offset: u64,
        done: &mut impl FnMut(u64, IoDone) -> Result<Option<IoBuf>, CliError>,
    ) -> Result<(), CliError> {
        self.stop.check()?;
        while self.in_flight >= self.depth {
            self.reap(done)?;
        }
        loop {
            match self.cluster.submit(self.image, op, offset) {
                Ok(()) => {
                    self.in_flight += 1;
                    return Ok(());
                }
                Err((SubmitError::Busy, back)) if self.in_flight > 0 => {
                    op = back;
                    self.reap(done)?;
                }
                Err((error, _)) => return Err(self.failed(offset, &error.to_string())),
            }
        }
    }

    fn reap(
        &mut self,
        done: &mut impl FnMut(u64, IoDone) -> Result<Option<IoBuf>, CliError>,
    ) -> Result<(), CliError> {
        let io = self.cluster.next_io()?;
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Err(error) = io.result {
            return Err(self.failed(io.user, &error.to_string()));
        }
        let offset = io.user;
        if let Some(buf) = done(offset, io)? {
            self.spare.push(buf);
        }
        Ok(())
    }

    /// After a failure: lets what is under way end, so that it cannot be taken for a later transfer's.
    /// Bounded, because operations are tried for ever while the cluster cannot serve.
    fn settle(&mut self) -> Result<(), CliError> {
        let deadline = Deadline::after(SETTLE_LIMIT);
        while self.in_flight > 0 && self.cluster.next_io_until(deadline)?.is_some() {
            self.in_flight -= 1;
        }
        Ok(())
    }

    fn drain(
        &mut self,
        done: &mut impl FnMut(u64, IoDone) -> Result<Option<IoBuf>, CliError>,
    ) -> Result<(), CliError> {
        while self.in_flight > 0 {
            self.reap(done)?;
        }
        Ok(())
    }
}

/// Where imported bytes come from.
pub enum Source {
    /// A regular file, whose holes are skipped.
    Sparse(File),
    /// Anything that is read from front to end.
    Stream(Box<dyn Read>),
}

/// What was moved.
#[derive(Clone, Copy, Default, Debug, serde::Serialize)]
pub struct Moved {
    /// Bytes read from the source.
    pub total_bytes: u64,
    /// Bytes that were not zero and were moved.
    pub data_bytes: u64,
}

/// What to do when the source goes on behind the image's end.
#[derive(Clone, Copy, Debug)]
pub enum Beyond<'a> {
    /// It is an error: the size was given, or is the source's.
    Refuse,
    /// The image of this name is made larger: the source does not say how long it is.
    Grow(&'a str),
}

/// Copies a source to the start of a freshly created image. Ends with everything durable.
pub fn import(
    cluster: &mut Cluster,
    image: OpenImage,
    source: Source,
    beyond: Beyond<'_>,
    depth: usize,
    bar: &ProgressBar,
    stop: &Stop,
) -> Result<Moved, CliError> {
    let mut pipeline = Pipeline::new(cluster, image, depth, "write the image", stop);
    let moved = import_through(&mut pipeline, source, beyond, bar);
    pipeline.settle()?;
    moved
}

/// Makes the image so large that `need` bytes fit, and at least twice as large as it was: few changes of its
/// record, and never much more to remove than was written.
fn grow(pipeline: &mut Pipeline<'_>, name: &str, need: u64) -> Result<(), CliError> {
    // The larger image is another handle; what is under way belongs to the old one.
    pipeline.drain(&mut |_, io| Ok(io.buf))?;
    let size = need.max(pipeline.image.size_bytes.saturating_mul(2)).next_multiple_of(CHUNK_BYTES);
    pipeline.cluster.set_image_size(name, size, false)?;
    pipeline.image = pipeline.cluster.open(name, OpenMode::ReadWrite)?;
    Ok(())
}

fn import_through(
    pipeline: &mut Pipeline<'_>,
    mut source: Source,
    beyond: Beyond<'_>,
    bar: &ProgressBar,
) -> Result<Moved, CliError> {
    let read_failed = |error| CliError::Io { what: "read the source".into(), source: error };
    let stop = pipeline.stop;
    let mut moved = Moved::default();
    let mut give_back = |_: u64, io: IoDone| Ok(io.buf);
    let mut at = 0;
    loop {
        if let Source::Sparse(file) = &mut source {
            let data = next_data(file, at).map_err(read_failed)?;
            // Chunks stay on their grid, so that requests are whole objects.
            at = data.map_or(u64::MAX, |data| data - data % CHUNK_BYTES);
            if at == u64::MAX {
                break;
            }
            file.seek(SeekFrom::Start(at)).map_err(read_failed)?;
        }
        let mut buf = pipeline.buffer()?;
        let Some(bytes) = buf.as_mut_slice() else { return Err(pipeline.failed(at, "buffer is shared")) };
        let got = match &mut source {
            Source::Sparse(file) => read_full(file, bytes, stop)?,
            Source::Stream(stream) => read_full(stream, bytes, stop)?,
        };
        if got == 0 {
            break;
        }
        let size = pipeline.image.size_bytes;
        match beyond {
            _ if at + got as u64 <= size => {}
            Beyond::Grow(name) => grow(pipeline, name, at + got as u64)?,
            Beyond::Refuse => {
                return Err(CliError::Refused {
                    what: "import".into(),
                    why: format!("the source is longer than the image ({size} bytes): give a larger --size"),
                });
            }
        }
        // The last block of a source that is no multiple of a block is filled with zeroes.
        let len = got.next_multiple_of(BLOCK_BYTES);
        if let Some(rest) = bytes.get_mut(got..len) {
            rest.fill(0);
        }
        moved.total_bytes = at + got as u64;
        for (from, len) in data_runs(bytes.get(..len).unwrap_or(&[])) {
            moved.data_bytes += len as u64;
            let offset = at + from as u64;
            pipeline.submit(Op::Write { offset, buf: buf.slice(from, len) }, offset, &mut |_, _| Ok(None))?;
        }
        if buf.is_unique() {
            pipeline.spare.push(buf);
        }
        at += got as u64;
        bar.set_position(at);
        if got < CHUNK_BYTES as usize {
            break;
        }
    }
    pipeline.drain(&mut give_back)?;
    pipeline.submit(Op::Flush, 0, &mut give_back)?;
    pipeline.drain(&mut give_back)?;
    Ok(moved)
}

/// Where exported bytes go.
pub enum Sink {
    /// A regular file: zeroes become holes.
    Sparse(File),
    /// Anything that is written from front to end.
    Stream(Box<dyn Write>),
}

/// Copies a whole image to a sink.
pub fn export(
    cluster: &mut Cluster,
    image: OpenImage,
    sink: Sink,
    depth: usize,
    bar: &ProgressBar,
    stop: &Stop,
) -> Result<Moved, CliError> {
    let mut pipeline = Pipeline::new(cluster, image, depth, "read the image", stop);
    let moved = export_through(&mut pipeline, sink, bar);
    pipeline.settle()?;
    moved
}

fn export_through(pipeline: &mut Pipeline<'_>, mut sink: Sink, bar: &ProgressBar) -> Result<Moved, CliError> {
    let write_failed = |error| CliError::Io { what: "write the output".into(), source: error };
    let image = pipeline.image;
    let mut moved = Moved { total_bytes: image.size_bytes, data_bytes: 0 };
    // Reads complete in any order; a stream wants them in theirs. The window bounds how many wait here.
    let window = pipeline.depth as u64 * CHUNK_BYTES;
    let mut waiting: BTreeMap<u64, IoBuf> = BTreeMap::new();
    let next = Cell::new(0u64);
    let mut place = |offset: u64, io: IoDone| {
        let Some(buf) = io.buf else { return Ok(None) };
        waiting.insert(offset, buf);
        let mut free = None;
        while let Some(buf) = waiting.remove(&next.get()) {
            moved.data_bytes += write_chunk(&mut sink, next.get(), buf.as_slice()).map_err(write_failed)?;
            next.set(next.get() + buf.len() as u64);
            bar.set_position(next.get());
            free = Some(buf);
        }
        // Only full chunks are used again: the last one is shorter.
        Ok(free.filter(|buf| buf.len() == CHUNK_BYTES as usize))
    };
    let mut at = 0;
    while at < image.size_bytes {
        while at - next.get() >= window {
            pipeline.reap(&mut place)?;
        }
        let len = CHUNK_BYTES.min(image.size_bytes - at);
        let mut buf = pipeline.buffer()?;
        buf.truncate(len as usize);
        pipeline.submit(Op::Read { offset: at, buf }, at, &mut place)?;
        at += len;
    }
    pipeline.drain(&mut place)?;
    match &mut sink {
        Sink::Sparse(file) => file.set_len(image.size_bytes).and_then(|()| file.sync_all()),
        Sink::Stream(stream) => stream.flush(),
    }
    .map_err(write_failed)?;
    Ok(moved)
}

/// Makes `from..to` of an image read as zeroes and frees its objects.
pub fn wipe(
    cluster: &mut Cluster,
    image: OpenImage,
    from: u64,
    to: u64,
    depth: usize,
    bar: &ProgressBar,
    stop: &Stop,
) -> Result<(), CliError> {
    let mut pipeline = Pipeline::new(cluster, image, depth, "remove data of the image", stop);
    let wiped = wipe_through(&mut pipeline, from, to, bar);
    pipeline.settle()?;
    wiped
}

fn wipe_through(pipeline: &mut Pipeline<'_>, from: u64, to: u64, bar: &ProgressBar) -> Result<(), CliError> {
    let object = OBJECT_BYTES as u64;
    let mut count = |_: u64, _: IoDone| Ok(None);
    let first = from.div_ceil(object);
    let head_end = (first * object).min(to);
    if from < head_end {
        pipeline.submit(Op::WriteZeroes { offset: from, len: head_end - from }, from, &mut count)?;
    }
    let end = to.div_ceil(object);
    let mut at = first;
    while at < end {
        let step = DELETE_OBJECTS.min(end - at);
        pipeline.submit(Op::DeleteObjects { first: at, count: step }, at * object, &mut count)?;
        at += step;
        bar.set_position((at * object).min(to) - from);
    }
    pipeline.drain(&mut count)
}

/// The first byte at or behind `at` that is not in a hole, or `None` behind the last data.
fn next_data(file: &File, at: u64) -> std::io::Result<Option<u64>> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // A file system without holes: everything is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok((at < file.metadata()?.len()).then_some(at)),
        Err(error) => Err(error.into()),
    }
}

/// Reads until the buffer is full or the source ends; a pipe delivers in pieces of its own choosing.
fn read_full(source: &mut dyn Read, buf: &mut [u8], stop: &Stop) -> Result<usize, CliError> {
    let mut got = 0;
    while let Some(rest) = buf.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match source.read(rest) {
            Ok(0) => break,
            Ok(bytes) => got += bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => stop.check()?,
            Err(source) => return Err(CliError::Io { what: "read the source".into(), source }),
        }
    }
    Ok(got)
}

/// Writes a chunk at its place, leaving out zeroes where the sink can have holes. Returns the bytes that
/// were not zero.
fn write_chunk(sink: &mut Sink, at: u64, bytes: &[u8]) -> std::io::Result<u64> {
    let mut data = 0;
    for (from, len) in data_runs(bytes) {
        data += len as u64;
        if let Sink::Sparse(file) = sink {
            file.seek(SeekFrom::Start(at + from as u64))?;
            file.write_all(bytes.get(from..from + len).unwrap_or(&[]))?;
        }
    }
    if let Sink::Stream(stream) = sink {
        stream.write_all(bytes)?;
    }
    Ok(data)
}

/// The runs of blocks that are not all zero: (start, length).
fn data_runs(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
        if is_zero(block) {
            continue;
        }
        let at = index * BLOCK_BYTES;
        match runs.last_mut() {
            Some((from, len)) if *from + *len == at => *len += block.len(),
            _ => runs.push((at, block.len())),
        }
    }
    runs
}

fn is_zero(block: &[u8]) -> bool {
    // Eight bytes at a time: the compiler makes vector code of it.
    let mut words = block.chunks_exact(8);
    words.by_ref().all(|word| word == [0; 8]) && words.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_blocks_are_left_out_and_neighbours_joined() {
        let mut bytes = vec![0u8; 6 * BLOCK_BYTES];
        assert!(data_runs(&bytes).is_empty());
        bytes[BLOCK_BYTES + 4095] = 1;
        bytes[2 * BLOCK_BYTES] = 1;
        bytes[5 * BLOCK_BYTES + 7] = 1;
        assert_eq!(data_runs(&bytes), [(BLOCK_BYTES, 2 * BLOCK_BYTES), (5 * BLOCK_BYTES, BLOCK_BYTES)]);
    }

    #[test]
    fn holes_are_found_and_the_end_too() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.seek(SeekFrom::Start(32 << 20)).unwrap();
        file.write_all(&[1; 4096]).unwrap();
        assert_eq!(next_data(&file, 0).unwrap(), Some(32 << 20));
        assert_eq!(next_data(&file, 40 << 20).unwrap(), None);
    }
}
