//! The pool: create, open, grow, back up, close, and the two ways in, `read` and `transaction`.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use core::fmt;

use super::context;
use super::format::{
    CHUNK, CLOSED, Counter, HEADER_AT, Header, MAX_LANES, MAX_LAYOUT, MAX_ZONES, MIN_SIZE, PAGE, Zone,
};
use super::heap::Heap;
use super::inner::{Inner, Parts};
use super::media::{Access, Backing, Durability, Media, open_locked, set_len};
use super::read::Reader;
use super::recover::read_log;
use super::roots;
use super::table::Table;
use super::tx::Transaction;
use crate::base::error::{Error, Refusal, Result};
use crate::base::text::ShortText;

/// How a new pool is to be.
///
/// ```
/// use memory_pool::persist::{Durability, PersistentConfig};
/// let config = PersistentConfig::new(64 << 20).layout("orders v1").durability(Durability::Power);
/// assert_eq!(config.size, 64 << 20);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PersistentConfig {
    /// Size of the file, at least 512 KiB. The file is sparse: what is not used takes no disk space.
    pub size: u64,
    /// Name of what is stored, with its version; opening asks for the same. At most 128 bytes.
    pub layout: String,
    /// When a transaction is safe. Kept in the file as the default of later openings.
    pub durability: Durability,
}

impl PersistentConfig {
    /// A pool of `size` bytes, without a layout name, that survives power failures.
    pub fn new(size: u64) -> Self {
        Self { size, layout: String::new(), durability: Durability::Power }
    }

    /// Sets the layout name.
    #[must_use]
    pub fn layout(mut self, layout: impl Into<String>) -> Self {
        self.layout = layout.into();
        self
    }

    /// Sets the durability.
    #[must_use]
    pub fn durability(mut self, durability: Durability) -> Self {
        self.durability = durability;
        self
    }
}

/// A heap in a file that survives the process, and (by [`Durability`]) power failures.
///
/// Cheap to clone: all clones are one open pool, which is closed with the last of them.
///
/// ```
/// use memory_pool::persist::{Durability, PBox, PersistentConfig, PersistentPool};
/// # let dir = std::env::temp_dir().join(format!("ppool-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir).unwrap();
/// # let path = dir.join("orders");
/// let config = PersistentConfig::new(1 << 20).layout("orders v1").durability(Durability::ProcessCrash);
/// let pool = PersistentPool::create(&path, config)?;
/// pool.transaction(|tx| {
///     let order = tx.alloc([17u64, 250])?;
///     tx.set_root("latest", &order)
/// })?;
/// pool.close()?;
///
/// let pool = PersistentPool::open(&path, "orders v1")?;
/// let amount = pool.read(|r| Ok(r.root::<[u64; 2]>("latest")?[1]))?;
/// assert_eq!(amount, 250);
/// # drop(pool);
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone)]
pub struct PersistentPool {
    pub(crate) inner: Arc<Inner>,
}

impl fmt::Debug for PersistentPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PersistentPool")
            .field("path", &self.inner.path)
            .field("identity", &self.inner.identity)
            .field("durability", &self.inner.durability)
            .finish_non_exhaustive()
    }
}

impl PersistentPool {
    /// Makes a new pool in a new file; an error where the file exists.
    pub fn create(path: impl AsRef<Path>, config: PersistentConfig) -> Result<Self> {
        let path = path.as_ref();
        if config.layout.len() > MAX_LAYOUT {
            return Err(Error::config("layout", &config.layout, "at most 128 bytes"));
        }
        if !(MIN_SIZE..=1 << 40).contains(&config.size) {
            return Err(Error::config("size", config.size, "512 KiB to 1 TiB"));
        }
        let header = new_header(&config)?;
        let file = open_locked(path, Access::Create)?;
        let made = fill(file, &header, config.durability).and_then(|media| {
            sync_folder(path)?;
            Self::assemble(media, header, config.durability, path, false)
        });
        if made.is_err() {
            // Not a pool yet, and ours.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Opens a pool for writing, with the durability it was created with. Finishes what was committed and
    /// not yet in place, and forgets what was not committed.
    pub fn open(path: impl AsRef<Path>, layout: &str) -> Result<Self> {
        Self::open_file(path.as_ref(), layout, None)
    }

    /// [`open`](Self::open) with another durability than the pool was created with.
    pub fn open_with(path: impl AsRef<Path>, layout: &str, durability: Durability) -> Result<Self> {
        Self::open_file(path.as_ref(), layout, Some(durability))
    }

    fn open_file(path: &Path, layout: &str, durability: Option<Durability>) -> Result<Self> {
        let file = open_locked(path, Access::Write)?;
        let (header, both) = read_header(&file)?;
        check_layout(&header, layout)?;
        if !header.writable() {
            let what = "no feature unknown to this release: open it read-only, or with a newer release";
            return Err(Error::corrupt(40, what, header.ro_compat));
        }
        let durability = durability.unwrap_or(match header.durability {
            1 => Durability::ProcessCrash,
            2 => Durability::Dax,
            _ => Durability::Power,
        });
        let media = Media::map(file, header.file_len(), true, durability)?;
        media.keep_backed(0, header.log_end())?;
        header.zones.iter().try_for_each(|zone| media.keep_backed(zone.start, zone.data() - zone.start))?;
        if !both {
            write_header(&media, &header)?;
        }
        Self::assemble(media, header, durability, path, false)
    }

    /// Opens a pool for reading only. Nothing is written to the file; what was committed and not yet in
    /// place is finished in memory. Several may read at once, beside no writer. Where a table is damaged,
    /// what is whole can still be read.
    pub fn open_read_only(path: impl AsRef<Path>, layout: &str) -> Result<Self> {
        Self::open_reading(path.as_ref(), Some(layout))
    }

    /// [`open_read_only`](Self::open_read_only) whatever the layout: for tools that look at any pool.
    pub fn open_any_layout(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_reading(path.as_ref(), None)
    }

    fn open_reading(path: &Path, layout: Option<&str>) -> Result<Self> {
        let file = open_locked(path, Access::Read)?;
        let (header, _) = read_header(&file)?;
        if let Some(layout) = layout {
            check_layout(&header, layout)?;
        }
        let media = Media::map(file, header.file_len(), false, Durability::ProcessCrash)?;
        Self::assemble(media, header, Durability::ProcessCrash, path, true)
    }

    /// Recovers, reads the tables and the roots.
    fn assemble(
        media: Media,
        header: Header,
        durability: Durability,
        path: &Path,
        read_only: bool,
    ) -> Result<Self> {
        let log = read_log(&media, &header)?;
        // SAFETY: nobody else has the pool yet.
        unsafe { super::journal::replay(&media, &log) };
        if !log.used.is_empty() && !read_only {
            media.fence();
            media.sync()?;
            let (earlier, last) = log.lanes();
            let places = |lanes: Vec<u32>| lanes.into_iter().map(|lane| header.lane(lane));
            // SAFETY: the records are in place for good; nobody else has the pool yet.
            unsafe { super::journal::clear_lanes(&media, places(earlier), places(last))? };
        }
        let table = Table::new(&header.zones);
        let backing = Backing::of(durability);
        let heap = Heap::new(&media, &table, &header.zones, backing, read_only)?;
        let replayed = log.records.len();
        let parts = Parts {
            media,
            table,
            heap,
            header,
            durability,
            names: HashMap::new(),
            path: path.to_owned(),
            replayed,
        };
        let inner = Inner::new(parts);
        roots::load(&inner, read_only)?;
        if read_only {
            inner.media.seal()?;
        } else {
            let recovered = u64::from(replayed > 0);
            // SAFETY: nobody holds references into the super page, nor has the pool yet.
            unsafe {
                let openings = inner.stored(Counter::Openings).wrapping_add(1);
                inner.media.store(Counter::Openings.at(), openings);
                let recoveries = inner.stored(Counter::Recoveries).wrapping_add(recovered);
                inner.media.store(Counter::Recoveries.at(), recoveries);
                inner.media.store(CLOSED, 0);
            }
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// A pool to be looked at, of which the log was read.
    pub(crate) fn assemble_lenient(media: Media, header: Header, path: &Path) -> Result<Self> {
        let table = Table::new(&header.zones);
        let heap = Heap::new(&media, &table, &header.zones, Backing::Reserved, true)?;
        let durability = Durability::ProcessCrash;
        let (names, path, replayed) = (HashMap::new(), path.to_owned(), 0);
        let parts = Parts { media, table, heap, header, durability, names, path, replayed };
        Ok(Self { inner: Arc::new(Inner::new(parts)) })
    }

    /// Runs `work`, and makes all it did happen if it returns `Ok`, or nothing of it if it returns an error
    /// or panics. Several threads may be in transactions at once; objects are locked as they are touched, and
    /// where two would wait for each other one gets [`Refusal::Conflict`](crate::base::error::Refusal) and can be run
    /// again. Inside a transaction of the same thread the two are one: an error of the inner ends both.
    pub fn transaction<R>(&self, work: impl FnOnce(&Transaction<'_>) -> Result<R>) -> Result<R> {
        let inner = &*self.inner;
        let current = context::current(inner);
        // SAFETY: used in this call only.
        if let Some(outer) = unsafe { current.transaction() } {
            return join(outer, work);
        }
        if current.reads {
            return Err(Error::refused(
                "a transaction inside a read of the same thread would wait for that read",
                "begin it after the read",
            ));
        }
        inner.present()?;
        let tx = Transaction::begin(inner)?;
        let value = context::within(inner, Some(&tx), || work(&tx))?;
        tx.commit()?;
        Ok(value)
    }

    /// Runs `work` while nothing that was committed changes: commits wait until it returns.
    pub fn read<R>(&self, work: impl FnOnce(&Reader<'_>) -> Result<R>) -> Result<R> {
        let inner = &*self.inner;
        let reader = Reader::new(inner);
        if context::current(inner).reads {
            return work(&reader);
        }
        inner.present()?;
        let reading = inner.heap.read();
        let outcome = context::within(inner, None, || work(&reader));
        drop(reading);
        inner.free_deferred();
        outcome
    }

    /// Adds at least `bytes` to the file, an eighth of its present size at the least.
    pub fn grow(&self, bytes: u64) -> Result<()> {
        let inner = &*self.inner;
        inner.open()?;
        if !inner.media.is_writable() {
            return Err(Error::refused("this pool was opened read-only", "open it for writing"));
        }
        let mut header = inner.header.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let start = header.file_len();
        if header.zones.len() == MAX_ZONES {
            return Err(Error::refused(
                "the pool has grown 128 times",
                "copy what it holds to a new, larger one",
            ));
        }
        let too_large = Error::config("bytes", bytes, "what a file can hold");
        let chunks = bytes.max(start / 8).div_ceil(CHUNK).max(1);
        if chunks > super::format::MAX_ZONE_CHUNKS {
            return Err(too_large);
        }
        let zone = Zone { start, chunks: chunks as u32 };
        // The extension is durable before anything speaks of it.
        inner.media.grow(zone.end())?;
        inner.media.back(zone.start, zone.data() - zone.start, Backing::Reserved)?;
        inner.media.sync()?;
        let mut grown = header.clone();
        grown.zones.push(zone);
        grown.generation += 1;
        write_header(&inner.media, &grown)?;
        *header = grown;
        let mut books = inner.heap.lock();
        inner.table.add(zone);
        books.add_zone(zone);
        Ok(())
    }

    /// Writes a copy of the pool to a new file. Commits wait meanwhile.
    pub fn backup(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let target = open_locked(path, Access::Create)?;
        let copied = self.read(|_| {
            let header = self.inner.header.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            set_len(&target, header.file_len())?;
            let mut words = vec![0u64; CHUNK as usize / 8];
            let mut at = 0;
            while at < header.file_len() {
                let count = ((header.file_len() - at).min(CHUNK) / 8) as usize;
                if let Some(next) = next_data(&self.inner.media, at) {
                    at = next / CHUNK * CHUNK;
                } else {
                    break;
                }
                self.inner.media.load_words(at, &mut words[..count]);
                let piece = &words[..count];
                // Holes stay holes.
                if piece.iter().any(|&word| word != 0) {
                    let bytes: &[u8] = bytemuck::cast_slice(piece);
                    target.write_all_at(bytes, at).map_err(|e| Error::io("pwrite", &e))?;
                }
                at += CHUNK;
            }
            Ok(())
        });
        let done = copied
            .and_then(|()| target.sync_all().map_err(|e| Error::io("fsync", &e)))
            .and_then(|()| sync_folder(path));
        if done.is_err() {
            let _ = std::fs::remove_file(path);
        }
        done
    }

    /// Closes the pool: what it holds is made durable (whatever its durability). An error where other handles are
    /// still there; they keep it open.
    pub fn close(self) -> Result<()> {
        let others = Arc::strong_count(&self.inner) - 1;
        match Arc::into_inner(self.inner) {
            Some(inner) if inner.media.is_writable() => shut(&inner),
            Some(_) => Ok(()),
            None => Err(Error::InvalidOperation(Refusal::StillLive(others))),
        }
    }

    /// The layout name.
    pub fn layout(&self) -> String {
        self.inner.header.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).layout.clone()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// When a transaction is safe.
    pub fn durability(&self) -> Durability {
        self.inner.durability
    }

    /// The random number that tells this pool from every other; a backup has its original's.
    pub fn identity(&self) -> u64 {
        self.inner.identity
    }

    /// Size of the file.
    pub fn size(&self) -> u64 {
        self.inner.media.len()
    }

    /// Whether it was opened read-only.
    pub fn is_read_only(&self) -> bool {
        !self.inner.media.is_writable()
    }

    /// Records that opening had to apply again: more than 0 after a crash in the middle of a commit.
    pub fn recovered_records(&self) -> usize {
        self.inner.replayed
    }

    /// Calls of `fdatasync` since the pool was opened.
    pub fn sync_count(&self) -> u64 {
        self.inner.media.syncs()
    }

    /// Records written to the log since the pool was opened.
    pub fn record_count(&self) -> u64 {
        self.inner.journal.records()
    }
}

/// Runs `work` as a part of a transaction of the same thread, which cannot happen without it.
#[cold]
#[inline(never)]
fn join<'t, R>(outer: &'t Transaction<'t>, work: impl FnOnce(&Transaction<'_>) -> Result<R>) -> Result<R> {
    struct Doom<'a>(&'a Transaction<'a>);
    impl Drop for Doom<'_> {
        fn drop(&mut self) {
            self.0.doom();
        }
    }
    let doom = Doom(outer);
    let outcome = work(outer);
    if outcome.is_ok() {
        core::mem::forget(doom);
    }
    outcome
}

/// Makes everything durable and notes that the pool was closed in order.
pub(crate) fn shut(inner: &Inner) -> Result<()> {
    if inner.media.load(CLOSED) == 1 {
        return Ok(());
    }
    inner.media.check_usable()?;
    inner.free_deferred();
    inner.heap.lock().store_counters(&inner.media);
    // SAFETY: nobody holds references into the super page.
    unsafe { inner.media.store(CLOSED, 1) };
    inner.media.flush(CLOSED, 8);
    inner.media.fence();
    inner.journal.settle(&inner.media, inner)
}

fn new_header(config: &PersistentConfig) -> Result<Header> {
    let lanes = if config.size >= 8 << 20 { MAX_LANES } else { MAX_LANES / 4 };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let mut header = Header {
        compat: 0,
        incompat: 0,
        ro_compat: 0,
        identity: random_identity(),
        created: now.as_secs(),
        lanes,
        generation: 1,
        layout: config.layout.clone(),
        zones: Vec::new(),
        minor: super::format::VERSION.1,
        durability: match config.durability {
            Durability::Power => 0,
            Durability::ProcessCrash => 1,
            Durability::Dax => 2,
        },
    };
    let zone = Zone::fitting(header.log_end(), config.size);
    header.zones.push(zone.ok_or(Error::config("size", config.size, "512 KiB to 1 TiB"))?);
    Ok(header)
}

/// Not 0. The standard library's hasher keys come from the system's source of randomness.
fn random_identity() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id()).max(1)
}

/// Gives a new file its contents; the header comes last.
fn fill(file: File, header: &Header, durability: Durability) -> Result<Media> {
    set_len(&file, header.file_len())?;
    let media = Media::map(file, header.file_len(), true, durability)?;
    let mut at = 0;
    while at < header.log_end() {
        media.back(at, CHUNK.min(header.log_end() - at), Backing::ZeroedPages)?;
        at += CHUNK;
    }
    let zone = header.zones[0];
    media.back(zone.start, zone.data() - zone.start, Backing::Reserved)?;
    media.sync()?;
    write_header(&media, header)?;
    Ok(media)
}

/// Writes both copies of the header, one after the other, so that one is whole at any time.
fn write_header(media: &Media, header: &Header) -> Result<()> {
    let words = header_words(header);
    for at in [HEADER_AT[1], HEADER_AT[0]] {
        // SAFETY: nobody holds references into the header; `grow` holds its lock.
        unsafe { media.store_words(at, &words) };
        media.flush(at, PAGE as usize);
        media.fence();
        media.sync()?;
    }
    Ok(())
}

/// The words of an encoded header.
pub(crate) fn header_words(header: &Header) -> Vec<u64> {
    let page = header.encode();
    page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default())).collect()
}

/// The better of the two copies of the header, and whether both are whole and the same.
pub(crate) fn read_header(file: &File) -> Result<(Header, bool)> {
    let [first, second] = header_copies(file)?;
    Header::choose(first, second)
}

/// Reads and checks both copies of the header.
pub(crate) fn header_copies(file: &File) -> Result<[Result<Header>; 2]> {
    let len = file.metadata().map_err(|e| Error::io("fstat", &e))?.len();
    let copy = |at: u64| {
        let mut page = [0u8; PAGE as usize];
        let room = len.saturating_sub(at).min(PAGE) as usize;
        file.read_exact_at(&mut page[..room], at).map_err(|e| Error::io("pread", &e))?;
        Header::decode(&page[..room], at, len)
    };
    Ok(HEADER_AT.map(copy))
}

fn check_layout(header: &Header, layout: &str) -> Result<()> {
    if header.layout != layout {
        return Err(Error::InvalidOperation(Refusal::WrongLayout { found: ShortText::new(&header.layout) }));
    }
    Ok(())
}

/// Makes the name of a new file durable.
fn sync_folder(path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| Error::io("fsync", &e))
}

/// The next offset with data in a sparse file; `None` behind the last.
fn next_data(media: &Media, at: u64) -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: moves the position of a descriptor that nobody reads or writes through by position.
        let next = unsafe { libc::lseek(media.file().as_raw_fd(), at as libc::off_t, libc::SEEK_DATA) };
        let ended = next < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO);
        // A read-only pool may have recovered into memory what the file has as a hole.
        if !media.is_writable() {
            return Some(at);
        }
        if ended { None } else { Some(u64::try_from(next).unwrap_or(at)) }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = media;
        Some(at)
    }
}
