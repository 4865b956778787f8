//! `persist_struct!`: structs that may be stored, without a line of unsafe code in the program.

/// Defines a `repr(C)` struct that implements [`Persist`](crate::persist::Persist): every field must, and there
/// must be no padding between them (add a field for it; the compiler says so). The file knows the type by its
/// name and the types of its fields.
///
/// ```
/// use memory_pool::persist::{Durability, PBox, PVec, PersistentConfig, PersistentPool};
/// memory_pool::persist_struct! {
///     /// A customer's orders.
///     pub struct Customer {
///         pub number: u64,
///         pub vip: bool,
///         pub pad: [u8; 7],
///         pub orders: PVec<u64>,
///         pub referrer: PBox<Customer>,
///     }
/// }
/// # let dir = std::env::temp_dir().join(format!("pstruct-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir).unwrap();
/// # let path = dir.join("pool");
/// let config = PersistentConfig::new(2 << 20).durability(Durability::ProcessCrash);
/// let pool = PersistentPool::create(&path, config)?;
/// pool.transaction(|tx| {
///     let orders = PVec::new(tx)?;
///     orders.push(tx, 4711)?;
///     let referrer = PBox::null();
///     let customer = tx.alloc(Customer { number: 1, vip: true, pad: [0; 7], orders, referrer })?;
///     tx.set_root("first", &customer)
/// })?;
/// pool.read(|r| {
///     let customer = r.root::<Customer>("first")?;
///     assert!(customer.vip && *customer.orders.get(r, 0)? == 4711);
///     Ok(())
/// })?;
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), memory_pool::Error>(())
/// ```
#[macro_export]
macro_rules! persist_struct {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident {
            $($(#[$field_meta:meta])* $field_vis:vis $field:ident: $type:ty),+ $(,)?
        }
    ) => {
        $(#[$meta])*
        #[repr(C)]
        $vis struct $name {
            $($(#[$field_meta])* $field_vis $field: $type),+
        }

        const _: () = {
            assert!(
                ::core::mem::size_of::<$name>() == 0 $(+ ::core::mem::size_of::<$type>())+,
                "a stored struct has no padding: add fields that fill it"
            );
            $(assert!(
                ::core::mem::align_of::<$name>() >= ::core::mem::align_of::<$type>(),
                "a stored struct is not packed"
            );)+
        };

        // SAFETY: every field is `Persist`, and there is no padding, as just asserted; `repr(C)` fixes the
        // layout, and the bits are valid if those of every field are.
        unsafe impl $crate::persist::Persist for $name {
            fn type_name() -> &'static str {
                concat!(stringify!($name), "{", $(stringify!($type), ";",)+ "}")
            }

            unsafe fn is_valid(place: *const u8) -> bool {
                // SAFETY: the caller's contract, for each field at its offset.
                unsafe {
                    true $(&& <$type as $crate::persist::Persist>::is_valid(
                        place.add(::core::mem::offset_of!($name, $field)),
                    ))+
                }
            }

            fn pointers(visit: &mut $crate::persist::Pointers) {
                $(visit.field::<$type>(::core::mem::offset_of!($name, $field));)+
            }
        }
    };
}
