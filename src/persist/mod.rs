//! Persistent pools: a heap in a file that survives the process and, where asked, power failures.
//!
//! | module | what |
//! |---|---|
//! | `format` | the file, byte by byte |
//! | `media`, `flush` | the mapped, locked file; syncs and flush instructions |
//! | `table` | what lies at an offset, without a lock |
//! | `heap`, `fold` | what may be handed out: an index in memory over the bitmaps in the file; its hash |
//! | `stash` | slots that transactions keep for their next objects |
//! | `journal`, `recover` | records in the log: written, applied, applied again after a crash |
//! | `gate` | the lock of the index, and the door between readers and commits |
//! | `locks`, `context`, `arena`, `tx`, `txapi` | transactions |
//! | `read`, `ptr`, `types`, `roots` | references, pointers, what may be stored, named roots |
//! | `survey`, `check` | what is reachable, what leaks, what is damaged |
//! | `array`, `vec`, `string`, `map`, `structs` | types made of them |
//! | `inner`, `pool`, `raw` | the open pool and its handle; blocks without a type |

mod arena;
mod array;
mod check;
mod context;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod damage;
#[cfg(test)]
mod faults;
mod flush;
mod fold;
mod format;
mod gate;
mod heap;
mod inner;
mod journal;
mod locks;
mod map;
mod media;
mod pool;
mod ptr;
mod raw;
mod read;
mod recover;
mod roots;
mod stash;
mod string;
mod structs;
mod survey;
mod table;
#[cfg(test)]
mod trace;
mod tx;
mod txapi;
mod types;
mod vec;

pub use check::{CheckReport, Damage, check, dump, repair};
pub use map::{MapHead, PHashMap};
pub use media::Durability;
pub use pool::{PersistentConfig, PersistentPool};
pub use ptr::{Handle, PBox, PRef, PRefMut};
pub use read::{Access, ObjectInfo, Reader};
pub use string::PString;
pub use tx::Transaction;
pub use txapi::Reserved;
pub use types::{Persist, Pointers};
pub use vec::{PVec, VecHead};
