//! The two lists in the file: named roots, and the types of what is stored.
//!
//! A root record is: next, target, fingerprint of the target, length of the name, the name padded to words.
//! A root that was removed keeps its record with target 0.

use super::format::{ROOTS_HEAD, TYPES_HEAD, internal};
use super::inner::Inner;
use super::ptr::{Handle, PBox};
use super::read::{Access, Reader, no_such_root};
use super::table::Object;
use super::tx::Transaction;
use super::types::{Persist, TypeInfo, fingerprint, text_of, words_of};
use crate::base::error::{Error, PointerFault, Result};

const NAME_AT: usize = 4;
const MAX_NAME: usize = 1024;
/// More records than any file holds would be a circle.
const MAX_RECORDS: usize = 1 << 24;

pub(crate) fn unknown(name: &str) -> Error {
    no_such_root(name)
}

/// Calls `visit` with the words of every record of a list. A link that leads to no such record is an error.
pub(crate) fn walk(
    inner: &Inner,
    head: u64,
    kind: u64,
    mut visit: impl FnMut(Object, &[u64]) -> Result<()>,
) -> Result<()> {
    let mut link = head;
    let mut at = inner.media.load(head);
    for _ in 0..MAX_RECORDS {
        if at == 0 {
            return Ok(());
        }
        let Ok((object, _)) = inner.live(at, kind) else {
            return Err(Error::corrupt(link, "a link to a live record: run memory-pool check", at));
        };
        let mut words = vec![0; (object.size / 8) as usize];
        inner.media.load_words(at, &mut words);
        visit(object, &words)?;
        link = at;
        at = words[0];
    }
    Err(Error::corrupt(head, "a list that ends: run memory-pool check", at))
}

/// The name in a root record.
pub(crate) fn name_of(words: &[u64]) -> Option<String> {
    text_of(words.get(NAME_AT..)?, words[3] as usize)
}

/// Reads both lists of a pool that was just opened.
pub(crate) fn load(inner: &Inner, lenient: bool) -> Result<()> {
    let mut names = std::collections::HashMap::new();
    let roots = walk(inner, ROOTS_HEAD, internal::ROOT, |object, words| {
        let damaged = |what| Err(Error::corrupt(object.offset, what, words[1]));
        let Some(name) = name_of(words) else {
            return damaged("the name of a root: run memory-pool check");
        };
        if words[1] != 0 && inner.live(words[1], words[2]).is_err() {
            return damaged("a root that leads to an object of its type: run memory-pool check");
        }
        names.insert(name, object.offset);
        Ok(())
    });
    if !lenient {
        roots?;
    }
    let types = walk(inner, TYPES_HEAD, internal::TYPE, |object, words| match TypeInfo::decode(words) {
        Some(info) => {
            inner.heap.lock().set_registered(info.fingerprint);
            Ok(())
        }
        None => Err(Error::corrupt(object.offset, "the record of a type: run memory-pool check", words[1])),
    });
    if !lenient {
        types?;
    }
    *inner.names.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = names;
    Ok(())
}

/// What the root in `record` points to, as `access` sees it.
pub(crate) fn target<T: Persist>(access: &impl Access, record: u64, name: &str) -> Result<PBox<T>> {
    let access = access.place();
    let inner = access.inner();
    let opened = access.open(inner.identity, record, internal::ROOT)?;
    let (place, _guard) = access.view(opened, 8, 16, false)?;
    // SAFETY: two words of the record, which the transaction has locked or the gate keeps.
    let [offset, kind] = unsafe { place.cast::<[u64; 2]>().read() };
    if offset == 0 {
        return Err(unknown(name));
    }
    if kind != fingerprint::<T>() {
        return Err(Error::pointer(offset as usize, PointerFault::WrongType));
    }
    Ok(PBox::new(inner.identity, offset))
}

/// The names of all roots that point to something.
pub(crate) fn names(reader: &Reader<'_>) -> Vec<String> {
    let names = reader.pool.names.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let set = |record: u64| reader.pool.media.load(record + 8) != 0;
    let mut names: Vec<_> =
        names.iter().filter(|(_, record)| set(**record)).map(|(name, _)| name.clone()).collect();
    names.sort();
    names
}

impl Transaction<'_> {
    fn record(&self, name: &str) -> Option<u64> {
        self.new_root(name).or_else(|| self.pool.root_record(name))
    }

    /// Makes `pointer` the root of that name, whatever was so before. Names have at most 1024 bytes.
    pub fn set_root<H: Handle>(&self, name: &str, pointer: &H) -> Result<()> {
        let pointer = pointer.as_box();
        let kind = fingerprint::<H::Target>();
        self.open(pointer.pool_identity(), pointer.offset(), kind, false)?;
        if name.len() > MAX_NAME {
            return Err(Error::config("name", name, "at most 1024 bytes"));
        }
        if self.record(name).is_none() {
            let next = self.head(ROOTS_HEAD)?;
            // Another transaction may have made it while this one waited for the list.
            if self.record(name).is_none() {
                let mut words = vec![next, pointer.offset(), kind, name.len() as u64];
                words.extend(words_of(name.as_bytes()));
                let record = self.link_record(ROOTS_HEAD, internal::ROOT, &words)?;
                self.note_root(name, record);
                return Ok(());
            }
        }
        let record = self.record(name).ok_or_else(|| unknown(name))?;
        self.write_record(record, [pointer.offset(), kind])
    }

    /// Makes the name point to nothing; what it pointed to stays.
    pub fn remove_root(&self, name: &str) -> Result<()> {
        let record = self.record(name).ok_or_else(|| unknown(name))?;
        self.write_record(record, [0, 0])
    }

    fn write_record(&self, record: u64, words: [u64; 2]) -> Result<()> {
        let opened = self.open(self.pool.identity, record, internal::ROOT, true)?;
        let place = self.image(opened, 0, 32)?;
        // SAFETY: four words of the record, borrowed for us alone until the line after.
        unsafe { place.cast::<[u64; 2]>().byte_add(8).write(words) };
        self.unborrow(opened.entry, true);
        Ok(())
    }

    /// The pointer that is the root of that name.
    pub fn root_handle<H: Handle>(&self, name: &str) -> Result<H> {
        let record = self.record(name).ok_or_else(|| unknown(name))?;
        target(self, record, name).map(H::from_box)
    }
}
