//! A hash map in a pool: open addressing, linear probing, in one block of slots.
//!
//! A slot begins with a word: 0 for never used, 1 for removed, else the key's hash with bit 1 set. The seed of
//! the hash is drawn when the map is made and kept in the file.

use core::fmt;
use core::hash::{BuildHasher, Hash, Hasher};
use core::marker::PhantomData;
use core::mem::offset_of;
use core::ptr::NonNull;

use super::array::{Block, Element};
use super::fold::Fold;
use super::ptr::{Handle, PBox, PRef, PRefMut, sealed};
use super::read::{Access, Place, reference};
use super::tx::{Transaction, check_value};
use super::types::{Persist, Pointers, short_name};
use crate::base::error::{Error, Result};

const EMPTY: u64 = 0;
const REMOVED: u64 = 1;

/// What a [`PHashMap`] points to.
#[repr(C)]
#[derive(Debug)]
pub struct MapHead<K, V> {
    block: u64,
    live: u64,
    /// Slots that are not empty.
    used: u64,
    seed: u64,
    _entries: PhantomData<fn() -> (K, V)>,
}

// SAFETY: four words, every bit pattern valid: all of them are checked when they are used.
unsafe impl<K: Persist, V: Persist> Persist for MapHead<K, V> {
    fn pointers(visit: &mut Pointers) {
        visit.pointer(0, Slots::<K, V>::fingerprint());
    }
}

#[repr(C)]
struct Slot<K, V> {
    state: u64,
    key: K,
    value: V,
}

type Slots<K, V> = Block<Slot<K, V>>;

impl<K: Persist, V: Persist> Element for Slot<K, V> {
    const SIZE: usize = size_of::<Self>();
    const ALIGN: usize = align_of::<Self>();
    fn name() -> String {
        format!("{}=>{}", short_name(K::type_name()), short_name(V::type_name()))
    }
    fn pointers(visit: &mut Pointers) {
        visit.field::<K>(offset_of!(Self, key));
        visit.field::<V>(offset_of!(Self, value));
    }
}

/// A handle on a hash map in a pool. Copies of the handle are the same map.
///
/// ```
/// use memory_pool::persist::{Durability, PHashMap, PersistentConfig, PersistentPool};
/// # let dir = std::env::temp_dir().join(format!("pmap-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir).unwrap();
/// # let path = dir.join("pool");
/// # let config = PersistentConfig::new(1 << 20).durability(Durability::ProcessCrash);
/// let pool = PersistentPool::create(&path, config)?;
/// let stock = pool.transaction(|tx| {
///     let stock = PHashMap::<u64, u32>::new(tx)?;
///     stock.insert(tx, 4711, 3)?;
///     tx.set_root("stock", &stock)?;
///     Ok(stock)
/// })?;
/// assert_eq!(pool.read(|r| Ok(stock.get(r, &4711)?.map(|n| *n)))?, Some(3));
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[repr(transparent)]
pub struct PHashMap<K, V>(PBox<MapHead<K, V>>);

impl<K, V> Clone for PHashMap<K, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K, V> Copy for PHashMap<K, V> {}

impl<K, V> fmt::Debug for PHashMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PHashMap({:#x})", self.0.offset())
    }
}

// SAFETY: a pointer.
unsafe impl<K: Persist, V: Persist> Persist for PHashMap<K, V> {
    fn pointers(visit: &mut Pointers) {
        PBox::<MapHead<K, V>>::pointers(visit);
    }
}

impl<K, V> sealed::Sealed for PHashMap<K, V> {}

impl<K: Persist, V: Persist> Handle for PHashMap<K, V> {
    type Target = MapHead<K, V>;
    fn as_box(&self) -> PBox<MapHead<K, V>> {
        self.0
    }
    fn from_box(pointer: PBox<MapHead<K, V>>) -> Self {
        Self(pointer)
    }
}

/// The words of a head.
#[derive(Clone, Copy)]
struct Head {
    block: u64,
    live: u64,
    used: u64,
    seed: u64,
}

impl<K: Persist + Hash + Eq, V: Persist> PHashMap<K, V> {
    /// A new, empty map.
    pub fn new(tx: &Transaction<'_>) -> Result<Self> {
        let seed = std::hash::RandomState::new().hash_one(tx.pool.identity);
        tx.alloc(MapHead { block: 0, live: 0, used: 0, seed, _entries: PhantomData }).map(Self)
    }

    fn head(&self, place: Place<'_>) -> Result<Head> {
        let head = |head: &MapHead<K, V>| {
            let MapHead { block, live, used, seed, .. } = *head;
            Head { block, live, used, seed }
        };
        match place {
            Place::Reader(reader) => reference(reader, &self.0).map(|found| head(&found)),
            Place::Transaction(tx) => reference(tx, &self.0).map(|found| head(&found)),
        }
    }

    fn state(seed: u64, key: &K) -> u64 {
        let mut hasher = Fold::default();
        hasher.write_u64(seed);
        key.hash(&mut hasher);
        hasher.finish() | 2
    }

    /// The word that begins slot `index`.
    fn state_at(slots: &Slots<K, V>, place: Place<'_>, index: usize) -> Result<u64> {
        let (slot, _guard) = slots.element(place, index)?;
        // SAFETY: the slot's first word, borrowed.
        Ok(unsafe { slot.cast::<u64>().read() })
    }

    /// The slot of `key`, or where it would go (a slot that was removed before it, or the empty one).
    fn find(slots: &Slots<K, V>, place: Place<'_>, state: u64, key: &K) -> Result<(usize, bool)> {
        let mut reusable = None;
        for step in 0..slots.len {
            let index = (state as usize).wrapping_add(step) % slots.len;
            match Self::state_at(slots, place, index)? {
                EMPTY => return Ok((reusable.unwrap_or(index), false)),
                REMOVED => reusable = reusable.or(Some(index)),
                found if found == state => {
                    let (slot, _guard) = slots.element(place, index)?;
                    // SAFETY: the key lies in the slot, which is borrowed.
                    let stored = check_value::<K>(unsafe { slot.add(offset_of!(Slot<K, V>, key)) })?;
                    // SAFETY: checked, and borrowed.
                    if unsafe { stored.as_ref() } == key {
                        return Ok((index, true));
                    }
                }
                _ => {}
            }
        }
        reusable.map(|index| (index, false)).ok_or(Error::corrupt(
            slots.opened.offset,
            "an empty slot in a hash map",
            slots.len as u64,
        ))
    }

    /// How many entries it has.
    pub fn len(&self, access: &impl Access) -> Result<usize> {
        self.head(access.place()).map(|head| head.live as usize)
    }

    /// Whether it has none.
    pub fn is_empty(&self, access: &impl Access) -> Result<bool> {
        self.len(access).map(|len| len == 0)
    }

    /// The value of `key`.
    pub fn get<'a>(&self, access: &'a impl Access, key: &K) -> Result<Option<PRef<'a, V>>> {
        let place = access.place();
        let head = self.head(place)?;
        if head.block == 0 {
            return Ok(None);
        }
        let slots = Slots::<K, V>::open(place, head.block)?;
        let (index, found) = Self::find(&slots, place, Self::state(head.seed, key), key)?;
        if !found {
            return Ok(None);
        }
        let (slot, guard) = slots.element(place, index)?;
        // SAFETY: the value lies in the slot, which is borrowed.
        let value = check_value::<V>(unsafe { slot.add(offset_of!(Slot<K, V>, value)) })?;
        // SAFETY: checked; the transaction has the block locked and counts the borrow, or the gate is held.
        Ok(Some(unsafe { PRef::new(value, guard) }))
    }

    /// Whether `key` has a value.
    pub fn contains_key(&self, access: &impl Access, key: &K) -> Result<bool> {
        self.get(access, key).map(|value| value.is_some())
    }

    /// The value of `key`, to be changed.
    pub fn get_mut<'a>(&self, tx: &'a Transaction<'a>, key: &K) -> Result<Option<PRefMut<'a, V>>> {
        let head = self.head(Place::Transaction(tx))?;
        if head.block == 0 {
            return Ok(None);
        }
        let slots = Slots::<K, V>::open_mut(tx, head.block)?;
        let (index, found) = Self::find(&slots, Place::Transaction(tx), Self::state(head.seed, key), key)?;
        if !found {
            return Ok(None);
        }
        let slot = slots.element_mut(tx, index)?;
        // SAFETY: the value lies in the slot, which is borrowed for us.
        let value = check_value::<V>(unsafe { slot.add(offset_of!(Slot<K, V>, value)) })
            .inspect_err(|_| tx.unborrow(slots.opened.entry, true))?;
        // SAFETY: checked, and borrowed for this reference.
        Ok(Some(unsafe { PRefMut::new(value, tx, slots.opened.entry) }))
    }

    fn write(
        slots: &Slots<K, V>,
        tx: &Transaction<'_>,
        index: usize,
        state: u64,
        entry: (K, V),
    ) -> Result<()> {
        let slot = slots.element_mut(tx, index)?;
        // SAFETY: the three fields lie in the slot, which is borrowed for us; what lies between them stays.
        unsafe {
            slot.cast::<u64>().write(state);
            slot.add(offset_of!(Slot<K, V>, key)).cast::<K>().write(entry.0);
            slot.add(offset_of!(Slot<K, V>, value)).cast::<V>().write(entry.1);
        }
        tx.unborrow(slots.opened.entry, true);
        Ok(())
    }

    /// The entry in a slot that has one.
    fn read(slots: &Slots<K, V>, tx: &Transaction<'_>, index: usize) -> Result<(K, V)> {
        let (slot, _guard) = slots.element(Place::Transaction(tx), index)?;
        // SAFETY: both lie in the slot, which is borrowed.
        let places =
            unsafe { (slot.add(offset_of!(Slot<K, V>, key)), slot.add(offset_of!(Slot<K, V>, value))) };
        let (key, value) = (check_value::<K>(places.0)?, check_value::<V>(places.1)?);
        // SAFETY: checked; the callers make the slot count no more, so these are the only copies.
        Ok(unsafe { (key.read(), value.read()) })
    }

    /// A block with the same entries and room for more.
    fn rehash(&self, tx: &Transaction<'_>, head: &Head) -> Result<Slots<K, V>> {
        let capacity = (head.live as usize * 2 + 8).next_power_of_two();
        let mut new = Slots::<K, V>::new(tx, capacity)?;
        let first = new.opened.offset + Slots::<K, V>::FIRST as u64;
        let bytes = new.capacity * size_of::<Slot<K, V>>();
        // SAFETY: the block is new and this transaction's.
        unsafe { tx.pool.media.at(first, bytes).write_bytes(0, bytes) };
        new.set_len(tx, new.capacity)?;
        if head.block != 0 {
            let old = Slots::<K, V>::open_mut(tx, head.block)?;
            for index in 0..old.len {
                let state = Self::state_at(&old, Place::Transaction(tx), index)?;
                if state > REMOVED {
                    let entry = Self::read(&old, tx, index)?;
                    let (to, _) = Self::find(&new, Place::Transaction(tx), state, &entry.0)?;
                    Self::write(&new, tx, to, state, entry)?;
                }
            }
            tx.free_opened(old.opened)?;
        }
        let mut stored = tx.get_mut(&self.0)?;
        (stored.block, stored.used) = (new.opened.offset, head.live);
        Ok(new)
    }

    /// Sets the value of `key`; returns the one it had.
    pub fn insert(&self, tx: &Transaction<'_>, key: K, value: V) -> Result<Option<V>> {
        let head = self.head(Place::Transaction(tx))?;
        let state = Self::state(head.seed, &key);
        let open = || Slots::<K, V>::open_mut(tx, head.block);
        let room = |slots: &Slots<K, V>| (head.used as usize + 1) * 8 <= slots.len * 7;
        let slots = match if head.block == 0 { None } else { Some(open()?).filter(room) } {
            Some(slots) => slots,
            None => self.rehash(tx, &head)?,
        };
        let (index, found) = Self::find(&slots, Place::Transaction(tx), state, &key)?;
        if found {
            let (_, old) = Self::read(&slots, tx, index)?;
            Self::write(&slots, tx, index, state, (key, value))?;
            return Ok(Some(old));
        }
        let was_empty = Self::state_at(&slots, Place::Transaction(tx), index)? == EMPTY;
        Self::write(&slots, tx, index, state, (key, value))?;
        let mut stored = tx.get_mut(&self.0)?;
        stored.live += 1;
        stored.used += u64::from(was_empty);
        Ok(None)
    }

    /// Takes the value of `key` out.
    pub fn remove(&self, tx: &Transaction<'_>, key: &K) -> Result<Option<V>> {
        let head = self.head(Place::Transaction(tx))?;
        if head.block == 0 {
            return Ok(None);
        }
        let slots = Slots::<K, V>::open_mut(tx, head.block)?;
        let (index, found) = Self::find(&slots, Place::Transaction(tx), Self::state(head.seed, key), key)?;
        if !found {
            return Ok(None);
        }
        let (_, value) = Self::read(&slots, tx, index)?;
        let slot: NonNull<u8> = slots.element_mut(tx, index)?;
        // SAFETY: the slot is borrowed for us. All of it is cleared, so that no pointer stays behind.
        unsafe {
            slot.write_bytes(0, size_of::<Slot<K, V>>());
            slot.cast::<u64>().write(REMOVED);
        }
        tx.unborrow(slots.opened.entry, true);
        let mut stored = tx.get_mut(&self.0)?;
        stored.live = stored.live.saturating_sub(1);
        Ok(Some(value))
    }

    /// Calls `visit` with every entry, in no particular order; stops when it says `false`.
    pub fn for_each(&self, access: &impl Access, mut visit: impl FnMut(&K, &V) -> bool) -> Result<()> {
        let place = access.place();
        let head = self.head(place)?;
        if head.block == 0 {
            return Ok(());
        }
        let slots = Slots::<K, V>::open(place, head.block)?;
        for index in 0..slots.len {
            let (slot, _guard) = slots.element(place, index)?;
            // SAFETY: the fields lie in the slot, which is borrowed.
            let (state, key, value) = unsafe {
                (
                    slot.cast::<u64>().read(),
                    slot.add(offset_of!(Slot<K, V>, key)),
                    slot.add(offset_of!(Slot<K, V>, value)),
                )
            };
            if state <= REMOVED {
                continue;
            }
            let (key, value) = (check_value::<K>(key)?, check_value::<V>(value)?);
            // SAFETY: checked, and borrowed.
            if !visit(unsafe { key.as_ref() }, unsafe { value.as_ref() }) {
                break;
            }
        }
        Ok(())
    }

    /// Frees the map; handles on it lead nowhere after. What entries point to stays.
    pub fn free(self, tx: &Transaction<'_>) -> Result<()> {
        let head = self.head(Place::Transaction(tx))?;
        if head.block != 0 {
            tx.free_opened(Slots::<K, V>::open_mut(tx, head.block)?.opened)?;
        }
        tx.free(self.0)
    }
}
