//! What may lie in a pool, and how the file names it.

use core::any::TypeId;
use core::cell::Cell;
use core::hash::{Hash, Hasher};

use bytemuck::{CheckedBitPattern, NoUninit};

use super::fold::Fold;
use super::format::Checksum;

/// Values that may be stored in a file and read back, perhaps by another program.
///
/// Plain data has it already: everything that is `bytemuck::CheckedBitPattern` (numbers, `bool`, `char`,
/// arrays, and structs and enums that derive it; `Pod` implies it) and `NoUninit`. Structs that hold
/// pointers of this crate get it, without a line of unsafe code, from [`persist_struct!`](crate::persist_struct).
///
/// # Safety
/// * Nothing in the type is an address, a reference, a handle of this process or an `UnsafeCell`.
/// * It has no destructor that matters: dropping the pool's file drops no values.
/// * It has no padding and no uninitialised bytes, and its layout is the same in every program that opens the
///   file (`repr(C)`, `repr(transparent)` or a primitive).
/// * [`is_valid`](Self::is_valid) is true only for bytes that are a valid value.
/// * [`pointers`](Self::pointers) names pointers that are in the type where it says.
///
/// ```
/// use memory_pool::persist::Persist;
/// #[derive(Clone, Copy)]
/// #[repr(C)]
/// struct Order { id: u64, amount: i64 }
/// // SAFETY: two numbers, no padding, every bit pattern valid.
/// unsafe impl Persist for Order {}
/// ```
pub unsafe trait Persist: Sized + 'static {
    /// The name by which the file knows the type; its module path does not count.
    fn type_name() -> &'static str {
        core::any::type_name::<Self>()
    }

    /// Whether the bytes at `place` are a valid value.
    ///
    /// # Safety
    /// `size_of::<Self>()` initialised bytes, aligned for `Self`, lie there and nobody writes to them.
    unsafe fn is_valid(place: *const u8) -> bool {
        let _ = place;
        true
    }

    /// Names the pointers in the type, so that a checker can follow them.
    fn pointers(visit: &mut Pointers) {
        let _ = visit;
    }
}

// SAFETY: `NoUninit` excludes padding, `CheckedBitPattern` implies `Copy`, so no destructor, and says which
// bits are valid; both exclude references and `UnsafeCell`. Derives demand a fixed representation.
unsafe impl<T: CheckedBitPattern + NoUninit> Persist for T {
    unsafe fn is_valid(place: *const u8) -> bool {
        // SAFETY: the caller's contract; `Bits` has the layout of `T` and is valid for any bit pattern.
        T::is_valid_bit_pattern(unsafe { &*place.cast::<<T as CheckedBitPattern>::Bits>() })
    }
}

/// Collects the pointers of a type; see [`Persist::pointers`].
#[derive(Debug, Default)]
pub struct Pointers {
    base: usize,
    found: Vec<Pointer>,
}

/// A pointer in a type: where, and to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    /// Where in the type its offset word lies.
    pub(crate) at: u32,
    /// Fingerprint of what it points to.
    pub(crate) target: u64,
}

impl Pointers {
    /// Visits the pointers of a field of type `T` at `offset`.
    pub fn field<T: Persist>(&mut self, offset: usize) {
        let base = self.base;
        self.base += offset;
        T::pointers(self);
        self.base = base;
    }

    pub(crate) fn pointer(&mut self, offset: usize, target: u64) {
        self.found.push(Pointer { at: (self.base + offset) as u32, target });
    }

    pub(crate) fn into_found(self) -> Vec<Pointer> {
        self.found
    }

    pub(crate) fn of<T: Persist>() -> Vec<Pointer> {
        let mut pointers = Self::default();
        T::pointers(&mut pointers);
        pointers.found
    }
}

/// `name` without the module paths in it: `a::B<c::D>` is `B<D>`.
pub(crate) fn short_name(name: &str) -> String {
    let mut short = String::with_capacity(name.len());
    let mut word = 0;
    let mut rest = name;
    while let Some(letter) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("::") {
            short.truncate(word);
            rest = after;
            continue;
        }
        short.push(letter);
        rest = &rest[letter.len_utf8()..];
        if !(letter.is_alphanumeric() || letter == '_') {
            word = short.len();
        }
    }
    short
}

/// The fingerprint of a type of that name and shape. The top bit tells types from what the pool stores
/// itself.
pub(crate) fn fingerprint_of(name: &str, size: usize, align: usize) -> u64 {
    let mut sum = Checksum::new(size as u64).add(align as u64);
    for byte in short_name(name).bytes() {
        sum = sum.add(byte.into());
    }
    sum.finish() | 1 << 63
}

/// The fingerprint of `T`: by name, size and alignment.
pub(crate) fn fingerprint<T: Persist>() -> u64 {
    const {
        assert!(!core::mem::needs_drop::<T>(), "a stored type has no destructor that matters");
    }
    cached::<T>(|| fingerprint_of(T::type_name(), size_of::<T>(), align_of::<T>()))
}

/// Remembers what `make` says of the type `K`, per thread.
#[inline]
pub(crate) fn cached<K: 'static>(make: impl FnOnce() -> u64) -> u64 {
    const SLOTS: usize = 64;
    thread_local! {
        static CACHE: [Cell<Option<(TypeId, u64)>>; SLOTS] = const { [const { Cell::new(None) }; SLOTS] };
    }
    let id = TypeId::of::<K>();
    CACHE.with(|cache| {
        let mut hash = Fold::default();
        id.hash(&mut hash);
        let slot = &cache[hash.finish() as usize % SLOTS];
        match slot.get() {
            Some((cached, fingerprint)) if cached == id => fingerprint,
            _ => {
                let fingerprint = make();
                slot.set(Some((id, fingerprint)));
                fingerprint
            }
        }
    })
}

/// What the file says of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TypeInfo {
    pub(crate) fingerprint: u64,
    pub(crate) name: String,
    pub(crate) size: u32,
    pub(crate) align: u32,
    /// 0 for one value; else elements of that many bytes, their count in the first word.
    pub(crate) stride: u32,
    /// Where the first element lies.
    pub(crate) first: u32,
    pub(crate) pointers: Vec<Pointer>,
}

impl TypeInfo {
    pub(crate) fn of<T: Persist>() -> Self {
        Self {
            fingerprint: fingerprint::<T>(),
            name: short_name(T::type_name()),
            size: size_of::<T>() as u32,
            align: align_of::<T>() as u32,
            stride: 0,
            first: 0,
            pointers: Pointers::of::<T>(),
        }
    }

    /// Words of a type record: next, fingerprint, size and alignment, stride and first, lengths of name and
    /// pointers, the name padded to words, then a word of place and one of target a pointer.
    pub(crate) fn encode(&self, next: u64) -> Vec<u64> {
        let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
        let mut words = vec![
            next,
            self.fingerprint,
            pair(self.size as usize, self.align as usize),
            pair(self.stride as usize, self.first as usize),
            pair(self.name.len(), self.pointers.len()),
        ];
        words.extend(words_of(self.name.as_bytes()));
        for pointer in &self.pointers {
            words.extend([pointer.at.into(), pointer.target]);
        }
        words
    }

    /// Reads a record of at most `words.len()` words; `None` where it is not one.
    pub(crate) fn decode(words: &[u64]) -> Option<Self> {
        let low = |word: u64| word as u32;
        let high = |word: u64| (word >> 32) as u32;
        let (header, rest) = words.split_at_checked(5)?;
        let (name_len, count) = (low(header[4]) as usize, high(header[4]) as usize);
        let (name, rest) = rest.split_at_checked(name_len.div_ceil(8))?;
        let pairs = rest.get(..count.checked_mul(2)?)?;
        let info = Self {
            fingerprint: header[1],
            name: text_of(name, name_len)?,
            size: low(header[2]),
            align: high(header[2]),
            stride: low(header[3]),
            first: high(header[3]),
            pointers: pairs.chunks_exact(2).map(|p| Pointer { at: low(p[0]), target: p[1] }).collect(),
        };
        let reach = if info.stride == 0 { info.size } else { info.stride };
        let inside =
            |p: &Pointer| p.at.is_multiple_of(8) && p.at.checked_add(8).is_some_and(|end| end <= reach);
        (info.align.is_power_of_two() && info.pointers.iter().all(inside)).then_some(info)
    }
}

/// Bytes as words, padded with zeros.
pub(crate) fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    })
}

/// The first `len` bytes of `words` as text.
pub(crate) fn text_of(words: &[u64], len: usize) -> Option<String> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    if len > bytes.len() {
        return None;
    }
    bytes.truncate(len);
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_their_paths_and_nothing_else() {
        assert_eq!(short_name("a::b::Order"), "Order");
        assert_eq!(short_name("a::Pair<b::C, [d::E; 4]>"), "Pair<C, [E; 4]>");
        assert_eq!(short_name("(u64, core::option::Option<x::Y>)"), "(u64, Option<Y>)");
    }

    #[test]
    fn fingerprints_tell_types_apart_and_the_cache_agrees() {
        let all = [
            fingerprint::<u64>(),
            fingerprint::<i64>(),
            fingerprint::<f64>(),
            fingerprint::<[u8; 8]>(),
            fingerprint::<u32>(),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
        assert_eq!(all[0], fingerprint::<u64>());
        assert_eq!(all[0], fingerprint_of("u64", 8, 8));
    }

    #[test]
    fn type_records_survive_the_round_trip_and_nonsense_is_refused() {
        let info = TypeInfo {
            fingerprint: 1 << 63 | 5,
            name: "Node{u64,PBox<Node>}".into(),
            size: 24,
            align: 8,
            stride: 0,
            first: 0,
            pointers: vec![Pointer { at: 16, target: 9 }],
        };
        let words = info.encode(77);
        assert_eq!(TypeInfo::decode(&words), Some(info.clone()));
        for cut in 0..words.len() {
            assert_eq!(TypeInfo::decode(&words[..cut]), None);
        }
        let outside = TypeInfo { pointers: vec![Pointer { at: 24, target: 9 }], ..info };
        assert_eq!(TypeInfo::decode(&outside.encode(0)), None);
        assert!(!unsafe_is_valid::<bool>(&[2]) && unsafe_is_valid::<bool>(&[1]));
    }

    fn unsafe_is_valid<T: Persist>(bytes: &[u8]) -> bool {
        assert!(bytes.len() == size_of::<T>() && align_of::<T>() == 1);
        // SAFETY: as many initialised bytes as the type has, of alignment 1.
        unsafe { T::is_valid(bytes.as_ptr()) }
    }
}
