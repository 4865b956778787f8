//! A walk over everything in a pool: what is reachable from the roots, what is not, what leads nowhere.

use std::collections::{HashMap, HashSet};

use super::format::{ROOTS_HEAD, TYPES_HEAD, internal};
use super::inner::Inner;
use super::pool::PersistentPool;
use super::read::ObjectInfo;
use super::roots;
use super::table::Object;
use super::tx::Transaction;
use super::types::TypeInfo;
use crate::base::error::{Error, Result};

/// What the walk found.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    pub(crate) types: HashMap<u64, TypeInfo>,
    pub(crate) roots: Vec<(String, u64, u64)>,
    pub(crate) reachable: HashSet<u64>,
    /// Live objects of the program's types that no root leads to.
    pub(crate) leaked: Vec<Object>,
    /// Live raw blocks, to which pointers do not lead.
    pub(crate) raw: Vec<Object>,
    /// Places of pointers that lead to no live object of their type, and what they hold.
    pub(crate) dangling: Vec<(u64, u64)>,
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
    /// What is wrong with the lists.
    pub(crate) lists: Vec<Error>,
}

impl Survey {
    /// Walks a pool in which nothing changes meanwhile.
    pub(crate) fn of(inner: &Inner) -> Self {
        let mut survey = Self::default();
        let types = &mut survey.types;
        let outcome = roots::walk(inner, TYPES_HEAD, internal::TYPE, |object, words| {
            let info = TypeInfo::decode(words).ok_or(Error::corrupt(
                object.offset,
                "the record of a type",
                words.get(1).copied().unwrap_or(0),
            ))?;
            types.insert(info.fingerprint, info);
            Ok(())
        });
        survey.lists.extend(outcome.err());
        let roots = &mut survey.roots;
        let outcome = roots::walk(inner, ROOTS_HEAD, internal::ROOT, |object, words| {
            let name =
                roots::name_of(words).ok_or(Error::corrupt(object.offset, "the name of a root", words[3]))?;
            if words[1] != 0 {
                roots.push((name, words[1], words[2]));
                if inner.live(words[1], words[2]).is_err() {
                    survey.dangling.push((object.offset + 8, words[1]));
                }
            }
            Ok(())
        });
        survey.lists.extend(outcome.err());
        survey.follow(inner);
        inner.table.for_each(&inner.media, |object| {
            survey.objects += 1;
            survey.bytes += object.size;
            match object.fingerprint {
                internal::RAW => survey.raw.push(object),
                kind if kind >= 1 << 63 && !survey.reachable.contains(&object.offset) => {
                    survey.leaked.push(object);
                }
                _ => {}
            }
            true
        });
        survey
    }

    fn follow(&mut self, inner: &Inner) {
        let mut ahead: Vec<(u64, u64)> =
            self.roots.iter().map(|(_, target, kind)| (*target, *kind)).collect();
        while let Some((offset, kind)) = ahead.pop() {
            let Ok((object, _)) = inner.live(offset, kind) else { continue };
            if !self.reachable.insert(offset) {
                continue;
            }
            let Some(info) = self.types.get(&kind) else { continue };
            if info.pointers.is_empty() {
                continue;
            }
            let count = if info.stride == 0 { 1 } else { inner.media.load(offset) };
            let (first, stride) = (u64::from(info.first), u64::from(info.stride));
            for element in 0..count {
                let start = first + element * stride;
                if start + stride.max(info.size.into()) > object.size {
                    break;
                }
                for pointer in &info.pointers {
                    let place = offset + start + u64::from(pointer.at);
                    let target = inner.media.load(place);
                    if target == 0 {
                        continue;
                    }
                    if inner.live(target, pointer.target).is_ok() {
                        ahead.push((target, pointer.target));
                    } else {
                        self.dangling.push((place, target));
                    }
                }
            }
        }
    }
}

impl PersistentPool {
    /// The live objects of the program's types that no root leads to: allocated, and forgotten before they
    /// were linked. Raw blocks are not among them.
    pub fn leaks(&self) -> Result<Vec<ObjectInfo>> {
        self.read(|_| {
            let survey = Survey::of(&self.inner);
            match survey.lists.first() {
                Some(error) => Err(*error),
                None => Ok(survey.leaked.iter().map(|&object| ObjectInfo::from(object)).collect()),
            }
        })
    }

    /// Frees those of `leaks` that are still live and unreachable, in one transaction; returns how many.
    /// Pointers to them that the program still has lead nowhere after.
    pub fn reclaim(&self, leaks: &[ObjectInfo]) -> Result<usize> {
        let still: HashSet<u64> = self.leaks()?.iter().map(|leak| leak.offset).collect();
        self.transaction(|tx: &Transaction<'_>| {
            let mut freed = 0;
            for leak in leaks.iter().filter(|leak| still.contains(&leak.offset)) {
                let opened = tx.open(self.inner.identity, leak.offset, leak.fingerprint, true)?;
                tx.free_opened(opened)?;
                freed += 1;
            }
            Ok(freed)
        })
    }
}
