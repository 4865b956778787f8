/* libpmemobj for the benchmark: each function is one operation, so that the figures hold no more than one call
 * from Rust to C beside it. A root of COUNT object ids is what inserts are linked from. */
#include <libpmemobj.h>
#include <stdint.h>
#include <string.h>

typedef PMEMobjpool pool;

pool *pm_create(const char *path, size_t size) { return pmemobj_create(path, "bench", size, 0600); }
pool *pm_open(const char *path) { return pmemobj_open(path, "bench"); }
void pm_close(pool *p) { pmemobj_close(p); }
const char *pm_error(void) { return pmemobj_errormsg(); }

/* A class of objects without headers, as small objects want it. */
int pm_class(pool *p) {
	struct pobj_alloc_class_desc desc = {
		.unit_size = 64, .alignment = 0, .units_per_block = 4000, .header_type = POBJ_HEADER_NONE, .class_id = 0,
	};
	if (pmemobj_ctl_set(p, "heap.alloc_class.new.desc", &desc))
		return -1;
	return (int)desc.class_id;
}

static PMEMoid *slots(pool *p, size_t count) {
	return pmemobj_direct(pmemobj_root(p, count * sizeof(PMEMoid)));
}

void *pm_root(pool *p, size_t count) { return slots(p, count); }

static int made(PMEMobjpool *p, void *ptr, void *arg) {
	pmemobj_memcpy_persist(p, ptr, arg, 64);
	return 0;
}

/* Allocates, writes and links in one atomic operation. */
int pm_insert(pool *p, PMEMoid *slot, const uint64_t *words) {
	return pmemobj_alloc(p, slot, 64, 1, made, (void *)words);
}

/* The same by reserve, write and publish. */
int pm_publish(pool *p, PMEMoid *slot, const uint64_t *words) {
	struct pobj_action acts[3];
	PMEMoid oid = pmemobj_reserve(p, &acts[0], 64, 1);
	if (OID_IS_NULL(oid))
		return -1;
	pmemobj_memcpy_persist(p, pmemobj_direct(oid), words, 64);
	pmemobj_set_value(p, &acts[1], &slot->pool_uuid_lo, oid.pool_uuid_lo);
	pmemobj_set_value(p, &acts[2], &slot->off, oid.off);
	return pmemobj_publish(p, acts, 3);
}

int pm_pair(pool *p, PMEMoid *slot) {
	if (pmemobj_alloc(p, slot, 64, 1, NULL, NULL))
		return -1;
	pmemobj_free(slot);
	return 0;
}

void pm_free(PMEMoid *slot) { pmemobj_free(slot); }

/* A transaction that allocates, writes and links. */
int pm_transaction(pool *p, PMEMoid *slot, const uint64_t *words) {
	int failed = 0;
	TX_BEGIN(p) {
		pmemobj_tx_add_range_direct(slot, sizeof(*slot));
		PMEMoid oid = pmemobj_tx_alloc(64, 1);
		memcpy(pmemobj_direct(oid), words, 64);
		*slot = oid;
	} TX_ONABORT {
		failed = -1;
	} TX_END
	return failed;
}

/* Fills a pool with 64-byte objects of a class; 0 for the default one. Returns how many. */
uint64_t pm_fill(pool *p, int class_id) {
	uint64_t count = 0;
	uint64_t words[8] = {1, 2, 3, 4, 5, 6, 7, 8};
	uint64_t flags = class_id ? POBJ_CLASS_ID((uint64_t)class_id) : 0;
	while (pmemobj_xalloc(p, NULL, 64, 1, flags, made, words) == 0)
		count++;
	return count;
}

uint64_t pm_iterate(pool *p) {
	uint64_t sum = 0;
	for (PMEMoid oid = pmemobj_first(p); !OID_IS_NULL(oid); oid = pmemobj_next(oid))
		sum += *(uint64_t *)pmemobj_direct(oid);
	return sum;
}

/* The first free and the first allocation after opening. */
int pm_first(pool *p) {
	PMEMoid oid = pmemobj_first(p);
	int class_id = pm_class(p);
	pmemobj_free(&oid);
	return pmemobj_xalloc(p, NULL, 64, 1, POBJ_CLASS_ID((uint64_t)class_id), NULL, NULL);
}
