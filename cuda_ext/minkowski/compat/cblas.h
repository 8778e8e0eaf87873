// The four CBLAS functions that MinkowskiEngine calls, on top of the BLAS inside PyTorch.
//
// libtorch_cpu exports the Fortran entry points of the BLAS it was linked with, and MinkowskiEngine links libtorch_cpu
// anyway. Forwarding to them saves users from installing a system BLAS. MinkowskiEngine includes this file inside
// `extern "C"`, so it has to stay plain C.
#ifndef SPARKME_MINKOWSKI_CBLAS_H
#define SPARKME_MINKOWSKI_CBLAS_H

typedef enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor = 102 } CBLAS_ORDER;
typedef enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112, CblasConjTrans = 113 } CBLAS_TRANSPOSE;

extern void sgemm_(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                   const int *, const float *, const int *, const float *, float *, const int *);
extern void dgemm_(const char *, const char *, const int *, const int *, const int *, const double *, const double *,
                   const int *, const double *, const int *, const double *, double *, const int *);
extern void saxpy_(const int *, const float *, const float *, const int *, float *, const int *);
extern void daxpy_(const int *, const double *, const double *, const int *, double *, const int *);

// Fortran reads matrices by columns. A row-major C = op(A) op(B) is the column-major C' = op(B)' op(A)': the operands
// change places, their transpose flags stay. Leading dimensions are at least 1 because BLAS rejects 0 even where the
// matrix has no elements (a kernel offset that no pair of sites uses).
#define SPARKME_DEFINE_GEMM(NAME, FORTRAN_NAME, SCALAR)                                                             \
  static inline void NAME(CBLAS_ORDER order, CBLAS_TRANSPOSE trans_a, CBLAS_TRANSPOSE trans_b, int m, int n, int k, \
                          SCALAR alpha, const SCALAR *a, int lda, const SCALAR *b, int ldb, SCALAR beta, SCALAR *c, \
                          int ldc) {                                                                                \
    const char flag_a = trans_a == CblasNoTrans ? 'N' : 'T';                                                        \
    const char flag_b = trans_b == CblasNoTrans ? 'N' : 'T';                                                        \
    lda = lda > 0 ? lda : 1;                                                                                        \
    ldb = ldb > 0 ? ldb : 1;                                                                                        \
    ldc = ldc > 0 ? ldc : 1;                                                                                        \
    if (order == CblasRowMajor)                                                                                     \
      FORTRAN_NAME(&flag_b, &flag_a, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);                         \
    else                                                                                                            \
      FORTRAN_NAME(&flag_a, &flag_b, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);                         \
  }

#define SPARKME_DEFINE_AXPY(NAME, FORTRAN_NAME, SCALAR)                                          \
  static inline void NAME(int n, SCALAR alpha, const SCALAR *x, int incx, SCALAR *y, int incy) { \
    FORTRAN_NAME(&n, &alpha, x, &incx, y, &incy);                                                \
  }

SPARKME_DEFINE_GEMM(cblas_sgemm, sgemm_, float)
SPARKME_DEFINE_GEMM(cblas_dgemm, dgemm_, double)
SPARKME_DEFINE_AXPY(cblas_saxpy, saxpy_, float)
SPARKME_DEFINE_AXPY(cblas_daxpy, daxpy_, double)

#undef SPARKME_DEFINE_GEMM
#undef SPARKME_DEFINE_AXPY

#endif  // SPARKME_MINKOWSKI_CBLAS_H
