//! A text in a pool.

use super::ptr::{Handle, PBox, PRef, sealed};
use super::read::Access;
use super::tx::Transaction;
use super::types::{Persist, Pointers};
use super::vec::{PVec, VecHead};
use crate::base::error::{Error, Result};

/// A handle on a growing text in a pool. Copies of the handle are the same text.
///
/// ```
/// use memory_pool::persist::{Durability, PString, PersistentConfig, PersistentPool};
/// # let dir = std::env::temp_dir().join(format!("pstr-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir).unwrap();
/// # let path = dir.join("pool");
/// # let config = PersistentConfig::new(1 << 20).durability(Durability::ProcessCrash);
/// let pool = PersistentPool::create(&path, config)?;
/// let text = pool.transaction(|tx| {
///     let text = PString::new(tx, "grüß")?;
///     text.push_str(tx, " dich")?;
///     Ok(text)
/// })?;
/// assert_eq!(pool.read(|r| Ok(text.as_str(r)?.to_owned()))?, "grüß dich");
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct PString(PVec<u8>);

// SAFETY: a pointer; that the bytes are UTF-8 is checked when they are read.
unsafe impl Persist for PString {
    fn pointers(visit: &mut Pointers) {
        PVec::<u8>::pointers(visit);
    }
}

impl sealed::Sealed for PString {}

impl Handle for PString {
    type Target = VecHead<u8>;
    fn as_box(&self) -> PBox<VecHead<u8>> {
        self.0.as_box()
    }
    fn from_box(pointer: PBox<VecHead<u8>>) -> Self {
        Self(PVec::from_box(pointer))
    }
}

impl PString {
    /// A handle on no text.
    pub const fn null() -> Self {
        Self(PVec::null())
    }

    /// A new text.
    pub fn new(tx: &Transaction<'_>, text: &str) -> Result<Self> {
        let new = Self(PVec::with_capacity(tx, text.len())?);
        new.push_str(tx, text)?;
        Ok(new)
    }

    /// The text.
    pub fn as_str<'a>(&self, access: &'a impl Access) -> Result<PRef<'a, str>> {
        let bytes = self.0.as_slice(access)?;
        if core::str::from_utf8(&bytes).is_err() {
            return Err(Error::corrupt(self.as_box().offset(), "a text in UTF-8", bytes.len() as u64));
        }
        // SAFETY: just checked, and borrowed, so unchanged.
        Ok(bytes.map(|bytes| unsafe { core::str::from_utf8_unchecked(bytes) }))
    }

    /// Adds to the end.
    pub fn push_str(&self, tx: &Transaction<'_>, text: &str) -> Result<()> {
        self.0.extend_from_slice(tx, text.as_bytes())
    }

    /// Replaces the text.
    pub fn set(&self, tx: &Transaction<'_>, text: &str) -> Result<()> {
        self.0.truncate(tx, 0)?;
        self.push_str(tx, text)
    }

    /// Frees the text; handles on it lead nowhere after.
    pub fn free(self, tx: &Transaction<'_>) -> Result<()> {
        self.0.free(tx)
    }
}
